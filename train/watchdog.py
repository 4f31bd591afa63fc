"""A limit on the time without progress: every rank's stack is written down, then all end."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from recipes.errors import LostRankError
from recipes.schema import Recipe
from train.lost import GOES_ON


def progress_limit(recipe: Recipe, world_size: int) -> float | None:
    """Seconds a rank may take for one micro batch; None: no limit.

    By default a little less than a collective may take, which would end the others before the
    stack of the rank they wait for is written.
    """
    minutes = recipe.guard.progress_timeout_minutes
    return start_limit(recipe, world_size) if minutes is None else 60 * minutes


def start_limit(recipe: Recipe, world_size: int) -> float | None:
    """Seconds a rank may take to build and load everything; None: no limit.

    What is set for a micro batch may be too short for that.
    """
    return 0.9 * 60 * recipe.parallel.timeout_minutes if world_size > 1 else None


class Watchdog:
    """Inside, a rank that makes no progress for too long writes its stacks and ends.

    All ranks wait for one that hangs, so all of them end. Stacks, also those of a crash
    (segmentation fault, bus error), go to `logs/rankN.log` of the run.

    Args:
        seconds: the limit; None: only crashes are written down.
        logs: folder of the logs.
        rank: this rank; rank 0 also says on the terminal what happened.
        key: what the limit comes from.
        doing: what begins now.
    """

    def __init__(
        self,
        seconds: float | None,
        logs: Path,
        rank: int,
        key: str = "guard.progress_timeout_minutes",
        doing: str = "a micro batch of step 0",
    ) -> None:
        self._seconds, self._logs, self._rank, self._key = seconds, logs, rank, key
        self._last, self._doing = time.monotonic(), doing
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        self._file = (self._logs / f"rank{self._rank}.log").open("a")
        faulthandler.enable(self._file)
        self._last = time.monotonic()
        if self._seconds is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        self._file.close()

    def beat(self, step: int) -> None:
        """There is progress: this step works on its next micro batch."""
        self._last, self._doing = time.monotonic(), f"a micro batch of step {step}"

    def _watch(self, seconds: float) -> None:
        pause, grace = min(1.0, seconds / 10), min(30.0, 1 + seconds / 20)
        while not self._ended.wait(pause):
            # Where a library never lets Python run, this thread does not either: then this, which
            # needs no Python, ends the process.
            faulthandler.dump_traceback_later(
                seconds + 2 * grace + 10 * pause, exit=True, file=self._file
            )
            late = self._last + seconds
            if time.monotonic() < late:
                continue
            text = (
                f"no progress for {seconds / 60:g} minutes ({self._key}) since {self._doing} began"
            )
            print(f"{time.strftime('%F %T')} {text}; all stacks:", file=self._file, flush=True)
            faulthandler.dump_traceback(self._file, all_threads=True)
            # The others began to wait at nearly the same time: they shall write theirs too.
            if self._ended.wait(grace) or self._last + seconds > late:
                continue  # not so hung after all
            if self._rank == 0:
                where = f"the stacks of all ranks are in {self._logs}"
                print(f"{LostRankError.__name__}: {text}; {where}; {GOES_ON}", file=sys.stderr)
                sys.stderr.flush()
            os._exit(LostRankError.exit_code)
