"""What processes forked from a trainer are able to do, and how they report."""

import os
import pickle
import queue
from typing import Any

import torch

from train.world import end_with_parent


class Mailbox:
    """Carries one object at a time from a forked child to its parent, or within a process.

    Unlike a pipe it takes an object of any size before somebody reads: Megatron joins the
    child first, so a pipe would block both for ever.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("mailbox")

    def __del__(self) -> None:
        os.close(self._file)

    def put(self, item: Any) -> None:
        """Replace what is inside."""
        os.ftruncate(self._file, 0)
        data, written = memoryview(pickle.dumps(item)), 0
        while written < len(data):
            written += os.pwrite(self._file, data[written:], written)

    def get_nowait(self) -> Any:
        """Take out what is inside; raises queue.Empty if there is nothing."""
        size = os.fstat(self._file).st_size
        if size == 0:
            raise queue.Empty
        data = b""
        while len(data) < size:
            data += os.pread(self._file, size - len(data), len(data))
        os.ftruncate(self._file, 0)
        return pickle.loads(data)


def can_act() -> bool:
    """Whether a forked process can do all of a save: it has no CUDA."""
    return not torch.cuda.is_available()


def work_for(trainer: int) -> None:
    """In a forked process: end with the trainer, as one that outlives it would write into what the
    next start writes; and let it go first where there are fewer cores than threads (measured, small
    with two threads on two cores: less than 0.8 s lost to a save instead of 2.4)."""
    end_with_parent()
    if os.getppid() != trainer:
        os._exit(1)
    os.nice(19)
