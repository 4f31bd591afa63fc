"""The `.distcp` files of a checkpoint: what Megatron plans to be in them is written here.

A file is a row of archives of PyTorch, one a tensor. `torch.save` takes 0.3 ms to make one, which
for tensors of a megabyte is more than the disk takes, and has Python's lock meanwhile; but only the
tensor itself differs between archives of one dtype and shape. So what is around it is kept. Each
file is written by a thread, which makes its checksum on the way.
"""

import contextlib
import ctypes
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.integrity import new_digest
from train.checksums import Sum

_SENT = 2**26
"""Bytes of a file that are sent to the disk at a time."""


def detach_storages(content: dict[str, Any]) -> None:
    """Let the tensors of a sharded state dict in host memory be of a storage each, where they are.

    Megatron first copies those that are parts of a buffer, as `torch.save` writes whole storages.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    for entry in nested_values(content):
        data: Any = entry.data if isinstance(entry, ShardedTensor) else None
        plain = type(data) in (torch.Tensor, torch.nn.Parameter)
        if plain and data.is_cpu and data.is_contiguous() and data.numel():
            memory = data.detach().view(-1).view(torch.uint8).numpy()
            entry.data = torch.from_numpy(memory).view(data.dtype).view(data.shape)


def write_shards(buckets: list[Any]) -> tuple[dict[int, list[Any]], dict[str, Sum]]:
    """Write files and sync them.

    Args:
        buckets: Megatron's (path, name, (objects, tensors)) of each file; objects and tensors are
            (WriteItem, io.BytesIO) and (WriteItem, torch.Tensor in host memory).

    Returns:
        What Megatron's own writer reports, number of the bucket -> its WriteResults; and the
        checksums of the files by name.

    Raises:
        OSError: one could not be written.
    """
    with without_crc(), ThreadPoolExecutor(len(buckets)) as threads:
        written = list(threads.map(_write_shard, buckets))
    sums = {bucket[1]: total for bucket, (_, total) in zip(buckets, written, strict=True)}
    return {i: results for i, (results, _) in enumerate(written)}, sums


def _write_shard(bucket: Any) -> tuple[list[Any], Sum]:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    path, name, (objects, tensors) = bucket
    results, archives = [], Archives()
    with _Shard(Path(path)) as shard:
        for item, data in [*objects, *tensors]:
            start = shard.size
            if isinstance(data, io.BytesIO):
                shard.write(data.getbuffer())
            else:
                archives.save(data, shard)
            size = shard.size - start
            place = _StorageInfo(name, start, size)
            results.append(WriteResult(item.index, size_in_bytes=size, storage_data=place))
        return results, shard.complete()


class _Shard:
    """A file that is written from its start to its end, unbuffered; the kernel begins to bring it
    to the disk meanwhile."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = new_digest()
        self._sent = 0
        self.size = 0

    def __enter__(self) -> "_Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """Append bytes, all of them."""
        rest = whole = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._digest.update(whole)
        self.size += len(whole)
        if self.size - self._sent >= _SENT:
            _start_writing(self._file.fileno(), self._sent, self.size - self._sent)
            self._sent = self.size
        return len(whole)

    def complete(self) -> Sum:
        """Have everything on the disk."""
        os.fsync(self._file.fileno())
        return Sum(self._digest.hexdigest(), self.size)


def _start_writing(descriptor: int, offset: int, size: int) -> None:
    """Have the kernel begin to write bytes of a file to the disk, where it can. They are safe after
    the sync at the end only, which then finds less to do."""
    write = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        sync = ctypes.CDLL(None).sync_file_range
        sync(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), write)


class Archives:
    """Writes tensors inside `without_crc`, byte for byte as `torch.save` does there."""

    def __init__(self) -> None:
        self._frames: dict[tuple[Any, ...], _Frame] = {}

    def save(self, tensor: torch.Tensor, file: Any) -> None:
        """Append one to a file, of which `write` is used."""
        plain = (
            type(tensor) is torch.Tensor
            and not (tensor.requires_grad or tensor.is_complex() or tensor.__dict__)
            and tensor.is_contiguous()
            and 0 < tensor.nbytes == tensor.untyped_storage().nbytes()
        )
        if not plain:
            archive = io.BytesIO()  # as an error of the file does not come through torch.save
            torch.save(tensor, archive)
            file.write(archive.getbuffer())
            return
        kind = tensor.shape, tensor.stride(), tensor.dtype
        if kind not in self._frames:
            self._frames[kind] = _Frame(tensor)
        frame = self._frames[kind]
        file.write(frame.before)
        file.write(tensor.view(-1).view(torch.uint8).numpy())
        file.write(frame.after)


class _Frame(io.BytesIO):
    """What is around a tensor in its archive. PyTorch hands each part to a file as it is in memory,
    so the tensor is the part with its address."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.before = self.after = b""
        self._address, self._passed = tensor.data_ptr(), False
        torch.save(tensor, self)
        assert self._passed

    def write(self, part: Any) -> int:
        """Called by PyTorch for each part, in order."""
        if np.frombuffer(part, np.uint8).ctypes.data == self._address:
            self._passed = True
        elif self._passed:
            self.after += part
        else:
            self.before += part
        return len(part)


@contextlib.contextmanager
def without_crc() -> Iterator[None]:
    """Inside, PyTorch's archives go without CRC-32, a third of the time they take: integrity.json
    has a checksum of every file."""
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
