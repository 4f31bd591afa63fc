"""Write one .bin/.idx pair in parts, so that a killed preparation continues.

    PREFIX.parts/inputs.json      what the parts were made from
    PREFIX.parts/00000.bin .idx   a finished part, valid once 00000.json is there
    PREFIX.parts/merged.*         the pair and its manifest, on their way to PREFIX.*

The pair at PREFIX is touched only when its successor is complete on the disk.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data.files import sha256_file, sync, write_json
from data.manifest import Manifest, OutputFile, load_manifest, path_with
from data.workers import Encoded

PART_BYTES = 64_000_000
_MERGED = "merged"


class PairWriter:
    """The parts of one pair."""

    def __init__(self, prefix: str, inputs: dict[str, Any], dtype: type[np.number[Any]]) -> None:
        """Open or start the parts folder; parts made from other inputs are dropped."""
        self._prefix, self._dtype = prefix, dtype
        self._folder = path_with(prefix, ".parts")
        record = self._folder / "inputs.json"
        if not record.is_file() or json.loads(record.read_text()) != inputs:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            write_json(record, inputs)
        self.parts = self._finished_parts()

    @property
    def documents(self) -> int:
        """Documents in finished parts."""
        return sum(p["documents"] for p in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens in finished parts."""
        return sum(p["tokens"] for p in self.parts)

    @property
    def bytes(self) -> int:
        """Text bytes in finished parts."""
        return sum(p["bytes"] for p in self.parts)

    def write_part(self, encoded: Iterator[Encoded], eod: int) -> bool:
        """Write the next part, PART_BYTES of text long; False if nothing was left."""
        first = next(encoded, None)
        if first is None:
            return False
        prefix = self._part_prefix(len(self.parts))
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=self._dtype)
        documents = tokens = size = 0
        item: Encoded | None = first
        while item is not None:
            text_bytes, ids = item
            builder.add_document(np.append(ids, eod), [len(ids) + 1])
            documents, tokens, size = documents + 1, tokens + len(ids) + 1, size + text_bytes
            item = next(encoded, None) if size < PART_BYTES else None
        builder.finalize(prefix + ".idx")
        for suffix in (".bin", ".idx"):
            sync(Path(prefix + suffix))
        part = {
            "documents": documents,
            "tokens": tokens,
            "bytes": size,
            "bin_bytes": Path(prefix + ".bin").stat().st_size,
            "idx_bytes": Path(prefix + ".idx").stat().st_size,
        }
        write_json(Path(prefix + ".json"), part)
        self.parts.append(part)
        return True

    def merge(self) -> tuple[OutputFile, OutputFile]:
        """Join the parts; returns size and hash of the new .bin and .idx."""
        merged = str(self._folder / _MERGED)
        if len(self.parts) == 1:
            for suffix in (".bin", ".idx"):
                os.replace(self._part_prefix(0) + suffix, merged + suffix)
        else:
            builder = IndexedDatasetBuilder(merged + ".bin", dtype=self._dtype)
            for number in range(len(self.parts)):
                builder.add_index(self._part_prefix(number))
            builder.finalize(merged + ".idx")
        outputs = []
        for suffix in (".bin", ".idx"):
            path = Path(merged + suffix)
            sync(path)
            outputs.append(OutputFile(path.stat().st_size, sha256_file(path)))
        return outputs[0], outputs[1]

    def publish(self, manifest: Manifest) -> None:
        """Put the merged pair in place, manifest last, and drop the parts."""
        manifest.save(self._folder / f"{_MERGED}.json")
        publish_merged(self._prefix)

    def _part_prefix(self, number: int) -> str:
        return str(self._folder / f"{number:05d}")

    def _finished_parts(self) -> list[dict[str, int]]:
        parts: list[dict[str, int]] = []
        while True:
            prefix = self._part_prefix(len(parts))
            if not Path(prefix + ".json").is_file():
                return parts
            part = json.loads(Path(prefix + ".json").read_text())
            for suffix in ("bin", "idx"):
                path = Path(f"{prefix}.{suffix}")
                if not path.is_file() or path.stat().st_size != part[f"{suffix}_bytes"]:
                    return parts
            parts.append(part)


def publish_merged(prefix: str) -> Manifest | None:
    """Move a complete merged pair into place; also finishes a move that was interrupted.

    Returns its manifest, or None if there is no complete merged pair.
    """
    folder = path_with(prefix, ".parts")
    staged = folder / f"{_MERGED}.json"
    manifest = load_manifest(staged)
    if manifest is None:
        return None
    target = path_with(prefix, ".json")
    # Without a manifest but with a parts folder, readers see an unfinished pair: nobody mixes
    # the new .bin with the old .idx.
    target.unlink(missing_ok=True)
    sync(target.parent)
    for suffix in (".bin", ".idx"):
        source = folder / (_MERGED + suffix)
        if source.exists():  # else moved before the interruption
            os.replace(source, path_with(prefix, suffix))
    sync(target.parent)
    os.replace(staged, target)
    sync(target.parent)
    shutil.rmtree(folder)
    return manifest
