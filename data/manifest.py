"""The manifest beside every .bin/.idx pair: what is in it, from what, by which tokenizer.

`PREFIX.json` is written last: a pair is finished if and only if its manifest is there and
agrees with the sizes of both files.
"""

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import os_errors_as_data_errors, write_json
from data.sources import InputFile
from data.tokenizer import TokenizerIdentity
from recipes.errors import DataError

FORMAT = 1
# Header of an .idx file, see _IndexWriter in megatron.core.datasets.indexed_dataset:
# magic, version, dtype code, number of sequences, number of documents.
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_MAGIC = b"MMIDIDX\x00\x00"


@dataclass(frozen=True)
class OutputFile:
    """Size and hash of a written file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of one .bin/.idx pair."""

    source: dict[str, Any]
    """The SourceConfig without its output, and what else decided the documents."""
    tokenizer: TokenizerIdentity
    inputs: list[InputFile]
    documents: int
    tokens: int
    """End-of-document tokens included."""
    bytes: int
    """UTF-8 bytes of the documents."""
    skipped: dict[str, int]
    """Documents left out, by reason: duplicates, empty, undecodable."""
    dtype: str
    bin: OutputFile
    idx: OutputFile
    versions: dict[str, str]
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write atomically."""
        write_json(path, dataclasses.asdict(self))


def path_with(prefix: str, suffix: str) -> Path:
    """`prefix` + `suffix`; a prefix may contain dots, so Path.with_suffix would be wrong."""
    return Path(prefix + suffix)


def load_manifest(path: Path) -> Manifest | None:
    """Read a manifest, or None if there is none.

    Raises:
        DataError: not a manifest this version can read.
    """
    if not path.is_file():
        return None
    try:
        with os_errors_as_data_errors(str(path), "make it readable"):
            raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}, this version reads {FORMAT}")
        return Manifest(
            **raw
            | {
                "tokenizer": TokenizerIdentity(**raw["tokenizer"]),
                "inputs": [InputFile(**f) for f in raw["inputs"]],
                "bin": OutputFile(**raw["bin"]),
                "idx": OutputFile(**raw["idx"]),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no manifest of this version ({error}); delete it and run "
            "python -m data.prepare again"
        ) from error


def missing_reason(prefix: str) -> str | None:
    """Why the pair at `prefix` cannot be read, or None if it is complete.

    A pair without a manifest (written by Megatron's own tools) counts as complete.
    """
    pair = [path_with(prefix, ".bin"), path_with(prefix, ".idx")]
    if path_with(prefix, ".parts").exists() and not path_with(prefix, ".json").exists():
        return "its preparation was not finished"
    if not all(p.is_file() for p in pair):
        return "no .bin/.idx there"
    manifest = load_manifest(path_with(prefix, ".json"))
    if manifest is not None and not sizes_agree(prefix, manifest):
        return "its .bin/.idx and .json do not belong together"
    return None


def sizes_agree(prefix: str, manifest: Manifest) -> bool:
    """Whether both files are there with the sizes of the manifest (cheap, no hashing)."""
    for suffix, expected in ((".bin", manifest.bin), (".idx", manifest.idx)):
        path = path_with(prefix, suffix)
        if not path.is_file() or path.stat().st_size != expected.bytes:
            return False
    return True


def fingerprint(prefix: str, manifest: Manifest | None) -> str:
    """Changes whenever the pair does; keys the cache of sample indices."""
    if manifest is not None:
        return f"{manifest.bin.sha256}-{manifest.idx.sha256}"
    status = path_with(prefix, ".idx").stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def check_pair(prefix: str) -> None:
    """Raise DataError unless the .idx and the size of the .bin belong together.

    Megatron maps both files as they are: a truncated one would give a crash in the middle
    of training, or garbage.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType

    idx, data = path_with(prefix, ".idx"), path_with(prefix, ".bin")
    with open(idx, "rb") as stream:
        header = stream.read(_IDX_HEADER.size)
    if len(header) < _IDX_HEADER.size or header[:9] != _IDX_MAGIC:
        raise DataError(f"{idx} is not a Megatron index; write it again with data.prepare")
    _, _, code, sequences, documents = _IDX_HEADER.unpack(header)
    if idx.stat().st_size < _IDX_HEADER.size + sequences * 12 + documents * 8:
        raise DataError(f"{idx} is cut off; write it again with python -m data.prepare")
    lengths = np.memmap(idx, np.int32, "r", _IDX_HEADER.size, (sequences,)) if sequences else None
    tokens = 0 if lengths is None else int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        raise DataError(f"{idx} holds no tokens; write it again with python -m data.prepare")
    if data.stat().st_size != tokens * DType.size(DType.dtype_from_code(code)):
        raise DataError(
            f"{data} has {data.stat().st_size} bytes, not what {idx.name} lists; write it again "
            "with python -m data.prepare"
        )
