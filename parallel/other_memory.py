"""Reads the memory of another process of this machine.

The kernel allows it to whom it allows to debug that process: to the same user, where Yama is not
stricter; there (`kernel.yama.ptrace_scope=1`) to whom that process names.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence

_PR_SET_PTRACER = 0x59616D61
"""Option of prctl(2)."""
_COUNT, _BYTES = 1024, 1 << 30
"""So many may be in one call: IOV_MAX blocks, and less than 2 GiB."""

Block = tuple[int, int, int]
"""Address there, bytes, and where they go here, from the start of the target."""


class _Part(ctypes.Structure):
    """iovec of readv(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


def allow_reading(reader: int) -> None:
    """Name the process that may read the memory of this one, for a kernel that asks for it."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(reader), 0, 0, 0)


def read_memory(process: int, blocks: Sequence[Block], target: int) -> None:
    """Copy blocks of memory of another process here.

    Args:
        process: whose memory.
        blocks: what to read, and where it goes.
        target: address here that they count from.

    Raises:
        OSError: the kernel does not allow it (EPERM, ENOSYS), or an address is not there.
    """
    call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    call.restype = ctypes.c_ssize_t
    for batch in _batches(blocks):
        vector = _Part * len(batch)
        here = vector(*(_Part(target + place, size) for _, size, place in batch))
        there = vector(*(_Part(address, size) for address, size, _ in batch))
        count = ctypes.c_ulong(len(batch))
        read = call(process, here, count, there, count, ctypes.c_ulong(0))
        if read != sum(size for _, size, _ in batch):
            code = ctypes.get_errno()
            raise OSError(code, f"process_vm_readv: {os.strerror(code)} ({read} bytes)")


def _batches(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks, cut where they are too large, as many together as one call takes."""
    batch: list[Block] = []
    room = _BYTES
    for address, size, place in blocks:
        while size:
            part = min(size, room)
            batch.append((address, part, place))
            address, place, size, room = address + part, place + part, size - part, room - part
            if room == 0 or len(batch) == _COUNT:
                yield batch
                batch, room = [], _BYTES
    if batch:
        yield batch
