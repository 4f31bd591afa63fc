"""Checksums of a checkpoint's files: made while they are written, compared before they are read.

`integrity.json` has Megatron's format, `{"algorithm": "sha256", "files": {NAME: HEX}}`, and the
sizes beside it under `bytes`, so that a message can say what happened to a file.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from data.files import sha256_file

SUMS = "integrity.json"
_PIECE = 2**20


@dataclass(frozen=True)
class Sum:
    """What a file was when it was written."""

    sha256: str
    bytes: int


def sum_of(file: Path) -> Sum:
    """Read a file that is there."""
    return Sum(sha256_file(file), file.stat().st_size)


class Following:
    """Sums of files that are written meanwhile, from their start to their end.

    PyTorch writes its archives so (its writer refuses to go back), so the sums are ready when the
    bytes are on the disk: the disk is the slower of the two.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._sums: dict[str, Sum] = {}

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """The files are written inside."""
        written = threading.Event()
        threads = [threading.Thread(target=self._follow, args=(f, written)) for f in self._files]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            written.set()
            for thread in threads:
                thread.join()

    def sums(self) -> dict[str, Sum]:
        """By name, after the files are written."""
        return {file.name: self._sums.get(file.name) or sum_of(file) for file in self._files}

    def _follow(self, file: Path, written: threading.Event) -> None:
        digest, done = hashlib.sha256(), 0
        while not file.exists():
            if written.wait(0.002):
                return
        piece = memoryview(bytearray(_PIECE))
        with file.open("rb", buffering=0) as stream:
            while True:
                last = written.is_set()
                while count := stream.readinto(piece):
                    digest.update(piece[:count])
                    done += count
                if last:
                    break
                written.wait(0.002)
        if done == file.stat().st_size:
            self._sums[file.name] = Sum(digest.hexdigest(), done)


def write_sums(folder: Path, known: Mapping[str, Sum]) -> None:
    """Write integrity.json of a checkpoint: the known sums, and those of its other files."""
    sums = {f.name: known.get(f.name) or sum_of(f) for f in sorted(folder.iterdir())}
    manifest = {
        "algorithm": "sha256",
        "files": {name: one.sha256 for name, one in sums.items()},
        "bytes": {name: one.bytes for name, one in sums.items()},
    }
    (folder / SUMS).write_text(json.dumps(manifest, indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """Compare every file with what it was, each rank its share; None if all are whole.

    A collective: every rank must call it, and gets the same answer.
    """
    manifest: list[dict[str, dict[str, int | str]] | str] = [""]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        try:
            manifest = [json.loads((folder / SUMS).read_text())]
        except (OSError, ValueError) as error:
            manifest = [f"{SUMS}: {error}"]
    dist.broadcast_object_list(manifest, src=0)
    if not isinstance(manifest[0], dict):
        return manifest[0]
    try:
        files, sizes = manifest[0]["files"], manifest[0].get("bytes", {})
        share = sorted(files)[rank::ranks]
        own = [(n, w) for n in share if (w := _wrong(folder / n, str(files[n]), sizes.get(n)))]
    except (KeyError, TypeError, AttributeError) as error:
        own = [(SUMS, f"{SUMS} is not as it was saved ({error})")]
    everyone: list[list[tuple[str, str]]] = [[] for _ in range(ranks)]
    dist.all_gather_object(everyone, own)
    return "; ".join(wrong for _, wrong in sorted(sum(everyone, []))) or None


def _wrong(file: Path, sha256: str, size: int | str | None) -> str | None:
    """What is wrong with a file, by name."""
    try:
        if size is not None and (now := file.stat().st_size) != size:
            return f"{file.name} has {now} bytes instead of {size}"
        if sha256_file(file) != sha256:
            return f"{file.name} is not what was saved: its SHA-256 differs"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror or error}"
    return None
