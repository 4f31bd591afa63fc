"""An action in a forked process: it sees everything as it was, while this process goes on."""

import gc
import os
import pickle
import queue
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

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
    """Whether a forked process can do all this one can: it has no CUDA, nor the threads through
    which gloo reaches other ranks (those of one rank need none, parallel/solo.py)."""
    return dist.get_world_size() == 1 and not torch.cuda.is_available()


def end_with(parent: int) -> None:
    """In a forked process: one that outlives its trainer would write into what the next start
    writes."""
    end_with_parent()
    if os.getppid() != parent:
        os._exit(1)


class Forked:
    """Runs an action in a child of this process that ends with it.

    The child has one thread: those of OpenMP do not survive a fork, and it would wait for them.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._outcome = Mailbox()
        self._parent = os.getpid()
        self._process = get_context("fork").Process(target=self._run, args=(action,))
        self._process.start()

    def ended(self, blocking: bool) -> bool:
        """Whether it has ended, or has it end."""
        if blocking:
            self._process.join()
        return not self._process.is_alive()

    def outcome(self) -> Exception | None:
        """What the action raised, after it has ended; ChildProcessError: it was killed."""
        self._process.join()
        try:
            error: Exception | None = self._outcome.get_nowait()
        except queue.Empty:
            return ChildProcessError(f"exit code {self._process.exitcode}")
        return error

    def _run(self, action: Callable[[], None]) -> None:
        end_with(self._parent)
        gc.disable()  # it would look at every object, and so copy every page with one
        torch.set_num_threads(1)
        error: Exception | None = None
        try:
            action()
        except KeyboardInterrupt:
            os._exit(130)  # the trainer was interrupted too, and says so
        except Exception as raised:  # by the parent again
            raised.add_note("".join(traceback.format_exception(raised)))
            error = raised
        self._outcome.put(error)
