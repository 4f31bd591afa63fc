"""Checksums of a checkpoint's files: made while they are written, compared before they are read.

`integrity.json` (model/integrity.py) has their sizes too, under `bytes`, so that a message can say
what happened to a file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.integrity import INTEGRITY, checksum, new_digest, write_manifest


@dataclass(frozen=True)
class Sum:
    """What a file was when it was written."""

    digest: str
    bytes: int | None
    """None: not known; Megatron's manifest has no sizes."""


def sum_of(file: Path) -> Sum:
    """Read a file that is there."""
    return Sum(checksum(file), file.stat().st_size)


def write_sums(folder: Path, known: Mapping[str, Sum]) -> None:
    """Write integrity.json of a checkpoint: the known sums, and those of its other files."""
    sums = {f.name: known.get(f.name) or sum_of(f) for f in sorted(folder.iterdir())}
    write_manifest(
        folder,
        {name: one.digest for name, one in sums.items()},
        bytes={name: one.bytes for name, one in sums.items()},
    )


def damage(folder: Path) -> str | None:
    """Compare every file with what it was, each rank its share; None if all are whole.

    A collective: every rank must call it, and gets the same answer.
    """
    manifest: list[Any] = [""]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        try:
            manifest = [json.loads((folder / INTEGRITY).read_text())]
        except (OSError, ValueError) as error:
            manifest = [f"{INTEGRITY}: {error}"]
    dist.broadcast_object_list(manifest, src=0)
    if not isinstance(manifest[0], dict):
        return manifest[0]
    try:
        files, sizes = manifest[0]["files"], manifest[0].get("bytes", {})
        algorithm = str(manifest[0]["algorithm"])
        new_digest(algorithm)  # raises if it is unknown
        share = sorted(files)[rank::ranks]
        own = [
            (n, w)
            for n in share
            if (w := _wrong(folder / n, Sum(str(files[n]), sizes.get(n)), algorithm))
        ]
    except (KeyError, TypeError, AttributeError) as error:
        own = [(INTEGRITY, f"{INTEGRITY} is not as it was saved ({error})")]
    everyone: list[list[tuple[str, str]]] = [[] for _ in range(ranks)]
    dist.all_gather_object(everyone, own)
    return "; ".join(wrong for _, wrong in sorted(sum(everyone, []))) or None


def _wrong(file: Path, was: Sum, algorithm: str) -> str | None:
    """What is wrong with a file, by name."""
    try:
        if was.bytes is not None and (now := file.stat().st_size) != was.bytes:
            return f"{file.name} has {now} bytes instead of {was.bytes}"
        if checksum(file, algorithm) != was.digest:
            return f"{file.name} is not what was saved: its checksum differs"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror or error}"
    return None
