"""The ranks of a run: given by torchrun or Slurm, or started here, one process a rank."""

import contextlib
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.backends import Backends
from recipes.errors import ConfigError
from recipes.schema import Recipe
from train.guards import STOP_SIGNALS

_RENDEZVOUS = "STRATA_RENDEZVOUS"
"""Set for ranks started here: the file through which they find each other."""


@dataclass(frozen=True)
class Launch:
    """Who this process is."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def rendezvous(self) -> str:
        """init_method of torch.distributed."""
        path = os.environ.get(_RENDEZVOUS)
        return f"file://{path}" if path else "env://"


def launched() -> Launch | None:
    """This process's place among ranks a launcher started; None if nobody did.

    Understands torchrun's variables and Slurm's (one task a rank).
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return None
    rank, world_size = int(env[names[0]]), int(env[names[1]])
    return Launch(rank, world_size, int(env.get(names[2], 0)), int(env.get(names[3], 1)))


def start_ranks(world_size: int, log_dir: Path) -> int:
    """Run this command again as `world_size` ranks on this machine and wait for them.

    Stop signals are passed on to every rank. When a rank fails the others get ten seconds to
    end by themselves and are then killed.

    Returns:
        The exit code of the first rank that ended with one, 0 if none did.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            env = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
                _RENDEZVOUS: f"{folder}/store",
            }
            output = None if rank == 0 else (log_dir / f"rank{rank}.log").open("ab")
            command = [sys.executable, *sys.orig_argv[1:]]
            ranks.append(subprocess.Popen(command, env=env, stdout=output, stderr=output))
        with _passing_on(ranks):
            return _wait(ranks)


@contextlib.contextmanager
def _passing_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {s: signal.signal(s, pass_on) for s in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        yield
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]], grace_seconds: float = 10.0) -> int:
    first: int | None = None
    deadline = float("inf")
    while any(p.poll() is None for p in ranks):
        if first is None:
            codes = [p.returncode for p in ranks if p.returncode]
            if codes:
                first, deadline = codes[0], time.monotonic() + grace_seconds
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    codes = [p.returncode for p in ranks if p.returncode]
    return first or (codes[0] if codes else 0)


@contextlib.contextmanager
def joined_world(
    recipe: Recipe, backends: Backends, launch: Launch | None, virtual_stages: int = 1
) -> Iterator[None]:
    """torch.distributed and Megatron's groups, up inside and down after.

    Raises:
        ConfigError: the launched ranks do not fit the recipe's layout.
    """
    import torch
    import torch.distributed as dist

    from parallel.groups import destroy_groups, initialize_groups

    local = launch.local_world_size if launch else 1
    if backends.device == "host":
        torch.set_num_threads(recipe.cluster.threads_per_rank or max(1, _cores() // local))
    timeout = datetime.timedelta(minutes=recipe.parallel.timeout_minutes)
    if launch is None:
        dist.init_process_group(
            backends.collectives, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        dist.init_process_group(
            backends.collectives,
            init_method=launch.rendezvous,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    try:
        initialize_groups(recipe.parallel, recipe.run.seed, virtual_stages)
        yield
    finally:
        destroy_groups()


def check_world(world_size: int, launch: Launch | None) -> None:
    """Compare the layout's world size with what a launcher gave.

    Raises:
        ConfigError: they differ.
    """
    if launch is not None and launch.world_size != world_size:
        raise ConfigError(
            f"parallel needs {world_size} ranks but the launcher started {launch.world_size}; "
            "change parallel.data_parallel_size or the number of launched ranks"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
