"""Run a function on several real processes that talk over gloo.

    def add_up(rank: int, world_size: int, offset: int) -> int:
        x = torch.tensor(rank + offset)
        torch.distributed.all_reduce(x)
        return int(x)

    assert run_distributed(add_up, 2, 10) == [21, 21]

Ranks are forked from a server process that has imported the heavy libraries once: importing
Megatron takes ten seconds, a fork takes milliseconds. They meet in a file, not at a port, so
that two test sessions on one machine cannot collide.
"""

import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

# Imported once by the fork server. tests.conftest comes first: it prepares the process.
PRELOADED = ["tests.conftest", "torch.distributed"]

# Seconds that ranks get, once their time is up, to write down where they hang.
GRACE = 2.0


class RankError(AssertionError):
    """A rank failed, or the ranks hung; the message says which and where."""


@dataclass(frozen=True)
class Outcome:
    """What a rank left behind: a value, or a traceback and when it was raised."""

    value: Any = None
    traceback: str | None = None
    time: float = 0.0


def run_distributed(
    func: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """Call `func(rank, world_size, *args)` on `world_size` ranks of one gloo group.

    `func` must stand at the top of a module; `args` and what it returns are pickled. The ranks'
    output is printed when they have ended, each line with its rank.
    Returns what the ranks returned, by rank. Raises `RankError` with the traceback that was
    raised first or, after `timeout` seconds, with the lines where the ranks hang. No process
    is left when this function returns.
    """
    context = _fork_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((func, args)))
        settings = (world_size, folder, dict(os.environ), timeout)
        ranks = [
            context.Process(target=_run_rank, args=(rank, *settings)) for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            in_time = _wait(ranks, timeout + GRACE)
            exit_codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                _kill(process)
        outcomes = [_read_outcome(folder, rank) for rank in range(world_size)]
        output = _collect_output(folder, world_size)
    print(output)
    if not in_time:
        raise RankError(f"{func.__name__} did not end within {timeout} s; its ranks:\n{output}")
    _check(func.__name__, outcomes, exit_codes)
    return [outcome.value for outcome in outcomes if outcome is not None]


def _fork_server() -> ForkServerContext:
    """The context whose processes are forked from one that has the libraries in memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # One thread a rank, set before numpy and torch are imported: only a process that has not
    # started threads can be forked safely.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _wait(ranks: list[ForkServerProcess], timeout: float) -> bool:
    """Wait until all ranks have ended, or one has failed and others had a moment to end of it.

    Returns False when the time is up.
    """
    deadline = time.monotonic() + timeout
    running = list(ranks)
    while running:
        left = max(0.0, deadline - time.monotonic())
        if not connection.wait([process.sentinel for process in running], left):
            return False
        if any(process.exitcode for process in running):
            # The end of the one that was killed may be known after that of those that miss it.
            until = time.monotonic() + GRACE
            for process in running:
                process.join(max(0.0, until - time.monotonic()))
            return True
        running = [process for process in running if process.exitcode is None]
    return True


def _kill(process: ForkServerProcess) -> None:
    """End a rank and whatever it has started (data loader workers, checkpoint writers)."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _read_outcome(folder: Path, rank: int) -> Outcome | None:
    file = folder / f"{rank}.outcome"
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _collect_output(folder: Path, world_size: int) -> str:
    """What the ranks wrote to stdout and stderr, each line with its rank."""
    files = [folder / f"{rank}.log" for rank in range(world_size)]
    return "\n".join(
        f"[rank {rank}] {line}"
        for rank, file in enumerate(files)
        if file.exists()
        for line in file.read_text(errors="replace").splitlines()
    )


def _check(name: str, outcomes: list[Outcome | None], exit_codes: list[int | None]) -> None:
    """Raise if a rank failed, with the first cause: later failures often only follow from it."""
    problems = [
        f"rank {rank} ended with exit code {code} and left no traceback "
        "(a negative code is the signal that killed it)"
        for rank, (outcome, code) in enumerate(zip(outcomes, exit_codes, strict=True))
        if outcome is None and code is not None
    ]
    raised = [
        (outcome.time, rank, outcome.traceback)
        for rank, outcome in enumerate(outcomes)
        if outcome is not None and outcome.traceback is not None
    ]
    if raised:
        _, rank, text = min(raised)
        problems.append(f"rank {rank} raised first:\n{text}")
    if problems:
        raise RankError(f"{name} failed on {len(outcomes)} ranks: " + "\n".join(problems))


def _run_rank(
    rank: int, world_size: int, folder: Path, environment: dict[str, str], timeout: float
) -> None:
    """The life of one rank, in its own process."""
    os.setsid()  # a process group of its own, for _kill
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.dump_traceback_later(timeout, file=2)
    # A rank ends by itself if the process that should kill it has died.
    signal.alarm(math.ceil(timeout + 2 * GRACE))
    # The environment is the caller's, not the one in which the server was started.
    os.environ.clear()
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    exit_code = 0
    try:
        payload = pickle.dumps(Outcome(value=_call(rank, world_size, folder, timeout)))
    except BaseException:
        raised_at = time.monotonic()
        traceback.print_exc()
        payload = pickle.dumps(Outcome(traceback=traceback.format_exc(), time=raised_at))
        exit_code = 1
    (folder / f"{rank}.outcome").write_bytes(payload)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: leaving a group of which another rank has failed may hang.
    os._exit(exit_code)


def _call(rank: int, world_size: int, folder: Path, timeout: float) -> Any:
    """Join the group and call the function. Imports are here so that their errors are reported."""
    import tests.conftest  # noqa: F401  prepares the process before the function is unpickled

    func, args = pickle.loads((folder / "call").read_bytes())

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        # Longer than ours, so that a hang is always reported as one, with the ranks' stacks.
        timeout=timedelta(seconds=timeout + 60),
    )
    value = func(rank, world_size, *args)
    if dist.is_initialized():
        # A rank that left early would break collectives of ranks that are still at work.
        dist.barrier()
    return value
