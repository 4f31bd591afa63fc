"""safetensors files, written and read tensor by tensor.

The library writes a file from tensors that are all in memory; here each tensor is written when
its turn comes. A file is 8 bytes (length of the header, little endian), the header (JSON: name ->
dtype, shape, data_offsets; padded with spaces to 8 bytes) and the values.
"""

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.conversion.table import Shape
from recipes.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items() if name in ("F32", "BF16", "F16")}
"""What is read: of quantised weights, without their scales, nothing can be made."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is."""

    file: Path
    dtype: torch.dtype
    shape: Shape
    start: int
    """Byte of the file."""
    name: str
    """In the file."""

    @property
    def bytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_file(
    path: Path, entries: Sequence[tuple[str, torch.dtype, Shape]], tensors: Iterable[Tensor]
) -> None:
    """Write one file; it is there only when it is complete and on the disk.

    Args:
        path: of the file.
        entries: name, dtype and shape of each tensor.
        tensors: the values in that order; each is taken when its turn comes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in entries:
        end = position + torch.Size(shape).numel() * dtype.itemsize
        offsets = [position, end]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, dtype, shape), tensor in zip(entries, tensors, strict=True):
            assert tensor.dtype == dtype and tuple(tensor.shape) == shape, name
            view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
            while view:  # one write takes 2 GiB at most
                view = view[file.write(view) :]
        os.fsync(file.fileno())
    os.replace(temporary, path)


class SafetensorsReader:
    """The tensors of a folder, one file or several.

    Raises:
        CheckpointError: there are none, or a file is missing, cut or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            for entry in _header(file):
                if entry.name in self.entries:
                    other = self.entries[entry.name].file
                    raise CheckpointError(f"{entry.name} is in both {other} and {file}")
                self.entries[entry.name] = entry

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            if (self.folder / SINGLE).exists():
                raise CheckpointError(
                    f"{self.folder} has both {SINGLE} and {INDEX}, of which readers take one or "
                    "the other; remove the one that is not meant"
                )
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} cannot be read ({type(error).__name__}: {error}); restore it"
                ) from error
            return [self.folder / name for name in sorted(names)]
        if (self.folder / SINGLE).exists():
            return [self.folder / SINGLE]
        raise CheckpointError(f"{self.folder} has neither {SINGLE} nor {INDEX}")

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one slice of its leading axis."""
        entry = self.entries[name]
        shape, start = entry.shape, entry.start
        if index is not None:
            shape = shape[1:]
            start += index * torch.Size(shape).numel() * entry.dtype.itemsize
        tensor = torch.empty(shape, dtype=entry.dtype)
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        with entry.file.open("rb", buffering=0) as file:
            file.seek(start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{entry.file} ends inside {name}; restore it")
                view = view[count:]
        return tensor


def _shape(sizes: Any) -> Shape:
    return tuple(int(size) for size in sizes)


def _header(file: Path) -> list[Entry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)))
        header.pop("__metadata__", None)
        found = sorted(
            (*map(int, what["data_offsets"][:2]), name, str(what["dtype"]), _shape(what["shape"]))
            for name, what in header.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{file} cannot be read ({type(error).__name__}: {error}); restore it"
        ) from error
    entries = []
    end = 8 + length
    for _, last, name, kind, shape in found:
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise CheckpointError(
                f"{file}: {name} is {kind}; weights that can be converted are " + ", ".join(_DTYPES)
            )
        entry = Entry(file, dtype, shape, end, name)
        end = 8 + length + last
        if entry.start + entry.bytes != end:
            raise CheckpointError(f"{file}: the place of {name} does not fit its shape")
        entries.append(entry)
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes, not {end}; restore it")
    return entries
