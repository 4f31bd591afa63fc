"""Files that are either complete or not there: hashes, atomic writes, locks, clear errors."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.errors import DataError


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as hex, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Return only after the bytes of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; wait for whoever has it.

    The kernel drops the lock when its holder dies, so a killed run leaves nothing behind
    that would block the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def os_errors_as_data_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn an OSError (no space, no permission, ...) into one sentence for the user.

    Args:
        what: the path, or key=path, that the user knows.
        remedy: what to do, after a semicolon.
    """
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename and str(error.filename) != what else ""
        reason = error.strerror or str(error)
        raise DataError(f"{what}{place}: {reason}; {remedy}") from error
