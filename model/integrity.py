"""`integrity.json` of a checkpoint: a checksum of each of its files.

The format is Megatron's, `{"algorithm": NAME, "files": {FILE: HEX}}`. Ours are of XXH3 with 128
bits, which sees what disks and networks do to a file and is as fast as memory; SHA-256, Megatron's
own (1.6 GB/s a core), took half of a save to a fast disk and two thirds of a load. Manifests with
SHA-256 are read as well: Megatron's, and those of before. What was changed on purpose is not found.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from recipes.errors import CheckpointError

INTEGRITY = "integrity.json"
ALGORITHM = "xxh3_128"
"""Of the checksums we write."""

_DIGESTS: dict[str, Any] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}


def new_digest(algorithm: str = ALGORITHM) -> Any:
    """An object with `update` and `hexdigest`.

    Raises:
        CheckpointError: another algorithm.
    """
    if algorithm not in _DIGESTS:
        raise CheckpointError(
            f"{INTEGRITY} has checksums of algorithm {algorithm!r}; known are {', '.join(_DIGESTS)}"
        )
    return _DIGESTS[algorithm]()


def checksum(file: Path, algorithm: str = ALGORITHM) -> str:
    """Checksum of a file as hex, read in pieces.

    Raises:
        OSError: it cannot be read.
        CheckpointError: another algorithm.
    """
    with open(file, "rb", buffering=0) as stream:
        digest = hashlib.file_digest(stream, lambda: new_digest(algorithm))
    return digest.hexdigest()


def write_manifest(folder: Path, files: Mapping[str, str], **more: Any) -> None:
    """Write the manifest, with further fields beside Megatron's."""
    manifest = {"algorithm": ALGORITHM, "files": dict(files), **more}
    (folder / INTEGRITY).write_text(json.dumps(manifest, indent=1) + "\n")
