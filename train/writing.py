"""How a checkpoint's bytes get to the disk: here or in a forked process, no failure unnoticed."""

import contextlib
import logging
import os
import queue
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
from train.checksums import Sum
from train.forked import Mailbox, work_for
from train.rundir import unusable
from train.saver import Saver
from train.shards import write_shards

_DIED = "the process that wrote it died"


@dataclass
class _Report:
    """What became of a write."""

    error: OSError | str | None = None
    """Why it failed; None: it did not."""
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
            request = request._replace(async_fn=_Telling(self._reports))
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
        except OSError as error:
            raise self._failed(error) from error

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
            report = _Report(_DIED)
        error = self._failed(report.error) if report.error is not None else None
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

    def _queue(self) -> Any:
        if self._background is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._background = AsyncCallsQueue()
        return self._background


class _Telling:
    """Stands where Megatron's write function does; puts into a mailbox what it wrote, or why not.

    Megatron's logs the reason and raises another error, or returns.
    """

    def __init__(self, reports: Mailbox) -> None:
        self._reports, self._trainer = reports, os.getpid()

    def __call__(self, rank: int, buckets: list[Any], results: Any) -> None:
        """With the arguments of Megatron's."""
        forked = os.getpid() != self._trainer
        if forked:
            work_for(self._trainer)
            go_without()
        try:
            written, sums = write_shards(buckets)
            results.put(written)
            report = _Report(sums=sums)
        except OSError as error:  # raised again on every rank, by the first finaliser
            report = _Report(error)
        except Exception as error:
            report = _Report(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            if not forked:
                raise
            os._exit(130)  # the trainer was interrupted too, and says so
        self._reports.put(report)
