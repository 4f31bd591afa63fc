"""A process that writes the state of a rank while the run goes on.

One that is forked for a save shares every page with the trainer, which then waits for a copy of
each that it writes to while the other lives. This one is forked once, while there is no state yet,
and copies states out of the trainer's memory into its own. Those of several ranks are a world of
their own, so that they can plan and complete a checkpoint together.
"""

import contextlib
import ctypes
import errno
import gc
import io
import mmap
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from parallel.groups import forked_world
from parallel.other_memory import Block, allow_reading, read_memory
from train.forked import work_for
from train.guards import STOP_SIGNALS

_LARGE = 1 << 16
"""Bytes of a tensor that is read out of the trainer's memory. Smaller ones are sent: the routers'
biases among them, which a backward pass changes."""
_ALIGNMENT = 64
_REFUSED = (errno.EPERM, errno.ENOSYS)


class Saver:
    """Runs an action on copies of this process' objects, one at a time; it ends with it.

    Create it before the objects, on all ranks: the action runs in a world of their processes. What
    tensors hold may change after `copied`, other objects after `start`.

    Args:
        action: called in the process, with what `start` is given.
        say: tells the user that its memory may not be read.
    """

    def __init__(self, action: Callable[..., None], say: Callable[[str], None]) -> None:
        self._say = say
        self._by_address, self._tried = True, False
        self._held: list[torch.Tensor] | None = None
        """What is being copied."""
        self._code: int | None = None
        trainer = os.getpid()
        several = dist.is_initialized() and dist.get_world_size() > 1
        join = forked_world("savers") if several else lambda: None
        self._pipe, theirs = Pipe()
        self._process = os.fork()
        if self._process == 0:
            self._pipe.close()
            try:
                _serve(trainer, theirs, join, action)
            except (EOFError, ConnectionError):  # nobody waits for it any more
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        allow_reading(self._process)

    def start(self, *arguments: Any) -> None:
        """Have the action done with these; the first time also wait until they have been copied.

        Raises:
            ChildProcessError: the process has died.
        """
        assert self._held is None
        self._send(arguments)
        if not self._tried:
            self._tried = True
            if refused := self._answer():
                self._say(
                    f"the writer of checkpoints may not read this process's memory ({refused}): "
                    "training waits while states are sent to it"
                )
                self._by_address = False
                self._send(arguments)

    def copied(self) -> None:
        """Wait until the tensors have been copied.

        Raises:
            ChildProcessError: the process has died, or cannot read them any more.
        """
        if self._held is not None and (refused := self._answer()):
            raise ChildProcessError(refused)

    def ended(self, blocking: bool) -> bool:
        """Whether the action has ended, or has it end."""
        seconds = None if blocking else 0
        if not self._pipe.poll(seconds):
            return False
        self.copied()
        return self._pipe.poll(seconds)

    def outcome(self) -> Exception | None:
        """What the action raised; ChildProcessError: the process has died."""
        self.copied()
        error: Exception | None = self._receive()
        return error

    def close(self) -> None:
        """End it, after what it is at."""
        with contextlib.suppress(ChildProcessError):
            self.copied()
        self._pipe.close()
        self._reap()

    def _send(self, arguments: tuple[Any, ...]) -> None:
        packed, blocks, self._held = _pack(arguments, self._by_address)
        try:
            self._pipe.send_bytes(packed)
            self._pipe.send(blocks)
        except OSError as error:
            raise self._death() from error

    def _answer(self) -> str | None:
        """Why the tensors could not be copied."""
        refused: str | None = self._receive()
        self._held = None
        return refused

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error

    def _death(self) -> ChildProcessError:
        self._held = None
        return ChildProcessError(f"exit code {self._reap()}")

    def _reap(self) -> int:
        if self._code is None:
            _, status = os.waitpid(self._process, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _serve(
    trainer: int, pipe: Any, join: Callable[[], None], action: Callable[..., None]
) -> NoReturn:
    """What the process does until its trainer closes the pipe, which is an EOFError."""
    work_for(trainer)
    for number in STOP_SIGNALS:  # meant for the trainer, which then saves
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork, and would be waited for
    join()
    gc.collect()
    gc.freeze()  # Megatron collects garbage in every save: not what was there before
    memory = _Memory(trainer)
    while True:
        packed = pipe.recv_bytes()
        try:
            memory.read(pipe.recv())
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            pipe.send(str(error))
            continue
        pipe.send(None)
        failed: Exception | None = None
        try:
            action(*_Unpickler(packed, memory).load())
        except Exception as error:  # raised again by the trainer
            error.add_note("".join(traceback.format_exception(error)))
            failed = error
        pipe.send(failed)


class _Memory:
    """Copies of blocks of another process' memory, in pages that stay for the next ones."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._pages = mmap.mmap(-1, 1)

    def read(self, blocks: list[Block]) -> None:
        """Replace them by these."""
        if not blocks:
            return
        size = max(place + size for _, size, place in blocks)
        if size > len(self._pages):
            self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        read_memory(self._process, blocks, address)

    def tensor(self, place: int | bytes, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        """One that begins at a place in what was read last, or that was sent."""
        count = shape.numel()
        if isinstance(place, bytes):
            whole = torch.frombuffer(bytearray(place), dtype=dtype, count=count) if place else None
        else:
            whole = torch.frombuffer(self._pages, dtype=dtype, count=count, offset=place)
        return torch.empty(shape, dtype=dtype) if whole is None else whole.view(shape)


def _pack(work: Any, by_address: bool) -> tuple[bytes, list[Block], list[torch.Tensor]]:
    """Pickle objects without their large tensors; blocks of memory and the tensors in them."""
    blocks: list[Block] = []
    tensors: list[torch.Tensor] = []
    end = 0

    def reduce(tensor: torch.Tensor) -> tuple[Any, ...]:
        nonlocal end
        tensor = tensor.detach().contiguous()
        address, size = tensor.data_ptr(), tensor.nbytes
        place: int | bytes
        if by_address and size >= _LARGE:
            place, end = end, -(-(end + size) // _ALIGNMENT) * _ALIGNMENT
            tensors.append(tensor)
            blocks.append((address, size, place))
        else:
            place = ctypes.string_at(address, size)
        return _tensor, (place, tensor.dtype, tensor.shape)

    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = {torch.Tensor: reduce, torch.nn.Parameter: reduce}
    pickler.dump(work)
    return stream.getvalue(), blocks, tensors


def _tensor(*arguments: Any) -> torch.Tensor:
    """A name for the method of the memory that was read."""
    raise NotImplementedError


class _Unpickler(pickle.Unpickler):
    """Makes what `_pack` took apart."""

    def __init__(self, packed: bytes, memory: _Memory) -> None:
        super().__init__(io.BytesIO(packed))
        self._memory = memory

    def find_class(self, module_name: str, name: str) -> Any:
        """The usual one, but for tensors."""
        if (module_name, name) == (_tensor.__module__, _tensor.__name__):
            return self._memory.tensor
        return super().find_class(module_name, name)
