"""How a checkpoint's bytes get to the disk: here or in a forked process, no failure unnoticed."""

import contextlib
import errno
import logging
import os
import queue
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.ranks import raise_together
from parallel.host_memory import go_without
from recipes.errors import CheckpointError
from train.checksums import Following, Sum
from train.forked import Mailbox, work_for
from train.rundir import unusable
from train.saver import Saver

_MEGATRON = "megatron.core.dist_checkpointing.strategies"
_DIED = "the process that wrote it died"
_FULL = 2**20
"""A disk with fewer bytes left counts as full: torch reports that as a nameless RuntimeError."""


@dataclass
class _Report:
    """What became of a write."""

    reasons: list[str] = field(default_factory=list)
    """Why it failed; empty: it did not."""
    sums: dict[str, Sum] = field(default_factory=dict)
    """Of the files written."""


class Writer:
    """Runs Megatron's save requests, one at a time, and explains why one failed.

    Args:
        run_dir: named in messages.
    """

    def __init__(self, run_dir: Path) -> None:
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        for name in ("strategies.torch", "strategies.async_utils", "serialization"):
            # What they warn of is this package's decision.
            logger = logging.getLogger(f"megatron.core.dist_checkpointing.{name}")
            logger.setLevel(logging.ERROR)
        # By default Megatron starts a manager process for this queue, which imports torch
        # (seconds, half a GiB) and outlives a killed run.
        filesystem_async._results_queue = Mailbox()
        self._run_dir = run_dir
        self._reports = Mailbox()
        self.sums: dict[str, Sum] = {}
        """Of the files that all ranks have written, for the finalisers of a request."""
        self._path = run_dir
        self._background: Any = None
        self._saver: Saver | None = None
        """At work on a save."""
        self._ended: list[Exception | None] = []
        """What came of it here, while other ranks' are at work on theirs."""
        self._done: Callable[[], None] = lambda: None

    def run(self, request: Any, path: Path, background: bool) -> None:
        """Execute an AsyncRequest that writes the checkpoint at `path`.

        Raises:
            CheckpointError: on every rank, if the bytes of any rank could not be written;
                what was written is removed. In the background: by `poll` or `wait`.
        """
        self._path = path
        if request.async_fn is None:
            self._reports.put(_Report())
        else:
            request = request._replace(
                async_fn=_Telling(request.async_fn, self._reports),
            )
        request.finalize_fns.insert(0, self._check)
        with self.explained():
            if background:
                self._queue().schedule_async_request(request)
            else:
                request.execute_sync()

    def hand_over(
        self, saver: Saver, content: tuple[Any, ...], path: Path, done: Callable[[], None]
    ) -> None:
        """Have other processes, one a rank, do a whole save; `copied`, `poll` or `wait` raise what
        they raised.

        Args:
            saver: this rank's process.
            content: what it is given.
            path: the checkpoint.
            done: called here, after it is complete.
        """
        assert self._saver is None
        self._path, self._done = path, done
        with self._death_told():
            saver.start(*content)
        self._saver = saver

    def copied(self) -> None:
        """Wait until nothing that is being saved is read here any more."""
        if self._saver is not None:
            with self._death_told():
                self._saver.copied()

    def poll(self, blocking: bool) -> None:
        """Finish a background write that is done. A collective: every rank must call it."""
        if self._saver is not None:
            self._poll(self._saver, blocking)
        if self._background is not None:
            with self.explained():
                self._background.maybe_finalize_async_calls(blocking=blocking)

    def _poll(self, saver: Saver, blocking: bool) -> None:
        """`poll` for what was handed over: complete once it is so on all ranks."""
        if not self._ended:
            try:
                with self._death_told():
                    if saver.ended(blocking):
                        self._ended = [saver.outcome()]
            except CheckpointError as death:
                self._ended = [death]
        everywhere = torch.tensor(len(self._ended))
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        if everywhere:
            (error,), self._ended, self._saver = self._ended, [], None
            raise_together(error)
            self._done()

    def close(self) -> None:
        """Finish what is being written."""
        self.poll(blocking=True)
        if self._background is not None:
            self._background.close()
            self._background = None

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a disk that is full, read-only, ... into one sentence for the user."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = self._reason(error)
            if reason is None:
                raise
            raise self._failed(reason) from error

    @contextlib.contextmanager
    def _death_told(self) -> Iterator[None]:
        try:
            yield
        except ChildProcessError as error:  # what it left goes with the next save
            raise self._failed(_DIED) from error

    def _check(self) -> None:
        """First of the finalisers: every rank has written, or every rank raises."""
        try:
            report = self._reports.get_nowait()
        except queue.Empty:
            report = _Report([_DIED])
        error = None
        if report.reasons:
            reason = report.reasons[0]
            number = re.search(r"\[Errno (\d+)\]", reason)
            known = OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
            error = self._failed(known or self._reason(RuntimeError(reason)) or reason)
        try:
            raise_together(error)
        except CheckpointError:
            shutil.rmtree(self._path, ignore_errors=True)  # half a checkpoint fills the disk
            raise
        shares: list[dict[str, Sum]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, report.sums)
        self.sums = {name: one for share in shares for name, one in share.items()}

    def _failed(self, reason: OSError | str) -> CheckpointError:
        if isinstance(reason, OSError):
            reason = unusable(self._run_dir, reason)
        else:
            reason = f"{reason}; see run.dir={self._run_dir}/logs; the last checkpoint is intact"
        return CheckpointError(f"{self._path.name} was not saved: {reason}")

    def _reason(self, error: OSError | RuntimeError) -> OSError | None:
        if isinstance(error, OSError):
            return error
        if shutil.disk_usage(self._run_dir).free < _FULL:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return None

    def _queue(self) -> Any:
        if self._background is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._background = AsyncCallsQueue()
        return self._background


class _Telling:
    """Calls Megatron's write function and puts into a mailbox why it failed, or what it wrote.

    Megatron's writer logs the reason, then raises another error, or returns.
    """

    def __init__(self, write: Callable[..., None], reports: Mailbox) -> None:
        self._write, self._reports, self._trainer = write, reports, os.getpid()

    def __call__(self, rank: int, buckets: list[Any], results: Any) -> None:
        """With the arguments of Megatron's: buckets are (path, name, data) of a file each."""
        files = Following([Path(bucket[0]) for bucket in buckets])
        report = _Report()
        collector = _Collector(logging.ERROR)
        logger = logging.getLogger(f"{_MEGATRON}.filesystem_async")
        logger.addHandler(collector)
        if os.getpid() != self._trainer:
            work_for(self._trainer)
            go_without()
        try:
            with files.following(), _no_crc():
                self._write(rank, buckets, results)
            if not collector.texts:
                report.sums = files.sums()
        except Exception as error:  # raised again on every rank, by the first finaliser
            collector.texts.append(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            if os.getpid() == self._trainer:
                raise
            os._exit(130)  # the trainer was interrupted too, and says so
        finally:
            logger.removeHandler(collector)
        report.reasons = collector.texts
        self._reports.put(report)


@contextlib.contextmanager
def _no_crc() -> Iterator[None]:
    """Inside, PyTorch's archives go without CRC-32, a third of the time they take: integrity.json
    has a checksum of every file."""
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _Collector(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
