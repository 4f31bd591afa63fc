"""The ranks of a run: given by torchrun or Slurm, or started here, one process a rank."""

import contextlib
import ctypes
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.backends import Backends
from parallel.host_memory import LARGE_PAGES
from recipes.errors import ConfigError, LostRankError
from recipes.schema import Recipe
from train.guards import STOP_SIGNALS
from train.lost import GOES_ON, failures_told
from train.rundir import usable

_RENDEZVOUS = "STRATA_RENDEZVOUS"
"""Set for ranks started here: the file through which they find each other."""
_FATE = "killed"
"""File beside it in which the starter says which rank was killed."""

NEXT_RENDEZVOUS = "STRATA_NEXT_RENDEZVOUS"
"""Set for the ranks of a later stage: the init_method they agreed on at the end of the last."""


@dataclass(frozen=True)
class Launch:
    """Who this process is."""

    rank: int
    world_size: int
    local_rank: int
    """Number among the ranks of this machine."""
    local_world_size: int
    """Ranks of this machine."""
    rendezvous: str
    """init_method of torch.distributed."""


def launched() -> Launch | None:
    """This process's place among ranks a launcher started; None if nobody did.

    Understands torchrun's variables and those of a Slurm job step (srun, one task a rank).

    Raises:
        ConfigError: the variables are incomplete or not numbers.
    """
    env = os.environ
    try:
        if "RANK" in env and "WORLD_SIZE" in env:
            return Launch(
                rank=int(env["RANK"]),
                world_size=int(env["WORLD_SIZE"]),
                local_rank=int(env.get("LOCAL_RANK", 0)),
                local_world_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
                rendezvous=_rendezvous(),
            )
        tasks = _slurm_tasks()
        if "SLURM_PROCID" not in env or tasks == 1:
            return None
        return Launch(
            rank=int(env["SLURM_PROCID"]),
            world_size=tasks,
            local_rank=int(env.get("SLURM_LOCALID", 0)),
            local_world_size=_tasks_of_this_node(),
            rendezvous=_slurm_rendezvous(),
        )
    except ValueError as error:
        raise ConfigError(
            f"the launcher's variables (RANK, WORLD_SIZE, ... or SLURM_PROCID, ...) cannot be "
            f"read: {error}; start with torchrun, srun or neither"
        ) from error


def given_ranks() -> bool:
    """Whether a launcher started this rank, and not a command of ours."""
    return launched() is not None and _RENDEZVOUS not in os.environ


def _slurm_tasks() -> int:
    """Tasks of this job step. A batch script has SLURM_NTASKS too, without being one of them."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" in env:
        return int(env["SLURM_STEP_NUM_TASKS"])
    return int(env.get("SLURM_NTASKS", "1")) if "MASTER_ADDR" in env else 1


def _rendezvous() -> str:
    path = os.environ.get(_RENDEZVOUS)
    if path:
        return f"file://{path}"
    if NEXT_RENDEZVOUS in os.environ:
        return os.environ[NEXT_RENDEZVOUS]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"RANK and WORLD_SIZE are set but {name} is not; start with torchrun, or set "
                "MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there"
            )
    return "env://"


def _tasks_of_this_node() -> int:
    """From Slurm's list of the tasks of each node, such as `4(x2),3`."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    text = next((os.environ[n] for n in names if n in os.environ), "1")
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[-1]


def _slurm_rendezvous() -> str:
    """MASTER_ADDR and MASTER_PORT, or the first node of the step and a port from its number."""
    env = os.environ
    if NEXT_RENDEZVOUS in env:
        return env[NEXT_RENDEZVOUS]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    host = env.get("MASTER_ADDR") or first_node(nodes)
    if not host:
        raise ConfigError(
            "SLURM_PROCID is set but neither MASTER_ADDR nor SLURM_STEP_NODELIST says where "
            "rank 0 is; start the ranks with srun"
        )
    number = int(env.get("SLURM_JOB_ID", 0)) + int(env.get("SLURM_STEP_ID", 0))
    # Below the ports Linux hands out by itself.
    port = env.get("MASTER_PORT") or str(20_000 + number % 10_000)
    return f"tcp://{host}:{int(port)}"


def first_node(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[03-07,12],cpu1` -> `gpu03`."""
    head = re.match(r"([^,\[]*)(?:\[([^\]]*)\]([^,\[]*))?", nodes)
    assert head is not None, "matches anything"
    prefix, numbers, suffix = head.groups(default="")
    return prefix + re.split(r"[-,]", numbers)[0] + suffix


def start_ranks(world_size: int, run_dir: Path) -> int:
    """Run this command again as `world_size` ranks on this machine and wait for them.

    Stop signals are passed on to every rank. When a rank fails the others get ten seconds to
    end by themselves and are then killed.

    Returns:
        The exit code of rank 0, or of the first rank that failed if rank 0 did not end by itself.

    Raises:
        ConfigError: run_dir cannot be written.
    """
    logs = run_dir / "logs"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        ranks = []
        for rank in range(world_size):
            env = (
                LARGE_PAGES
                | os.environ
                | {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    _RENDEZVOUS: f"{folder}/store",
                }
            )
            output = None
            if rank > 0:
                with usable(run_dir):
                    logs.mkdir(parents=True, exist_ok=True)
                    output = opened.enter_context((logs / f"rank{rank}.log").open("ab"))
            process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                env=env,
                stdout=output,
                stderr=output,
                # Ctrl-C reaches a rank once, through us, not also from the terminal.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            ranks.append(process)
        with _passing_on(ranks):
            return _wait(ranks, Path(folder) / _FATE, logs)


def end_with_parent() -> None:
    """A rank whose starter is killed would go on writing into the run's directory."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextlib.contextmanager
def _passing_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {s: signal.signal(s, pass_on) for s in STOP_SIGNALS}
    try:
        yield
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(
    ranks: list[subprocess.Popen[bytes]], fate: Path, logs: Path, grace_seconds: float = 10.0
) -> int:
    failed: int | None = None
    deadline = float("inf")
    while any(p.poll() is None for p in ranks):
        if failed is None:
            failed = _first_failed(ranks)
            if failed is not None:
                deadline = time.monotonic() + grace_seconds
                if ranks[failed].returncode < 0:
                    fate.write_text(_ended(failed, ranks[failed].returncode))
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    failed = _first_failed(ranks) if failed is None else failed
    # Rank 0 says what was wrong; the others may only have lost their connection to it.
    told = ranks[0].returncode
    if failed is None or told > 0:
        return told
    text = _ended(failed, ranks[failed].returncode)
    if failed != 0 and told == -signal.SIGKILL:
        text += ", rank 0 did not end by itself"
    print(f"{LostRankError.__name__}: {text}; see {logs}; {GOES_ON}", file=sys.stderr)
    return max(ranks[failed].returncode, 0) or LostRankError.exit_code


def _first_failed(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """One that was killed, if there is one: what it broke fails at the same time."""
    bad = [rank for rank, process in enumerate(ranks) if process.poll()]
    return min(bad, key=lambda rank: (ranks[rank].returncode > 0, rank), default=None)


def _ended(rank: int, code: int) -> str:
    if code > 0:
        return f"rank {rank} ended with exit code {code}"
    return f"rank {rank} was ended by {signal.Signals(-code).name}"


@contextlib.contextmanager
def joined_world(
    recipe: Recipe, backends: Backends, launch: Launch | None, virtual_stages: int = 1
) -> Iterator[None]:
    """torch.distributed and Megatron's groups, up inside and down after.

    Raises:
        ConfigError: the launched ranks do not fit the recipe's layout.
        StrataError: another rank failed inside; see train.lost.
    """
    import torch
    import torch.distributed as dist

    from parallel.groups import destroy_groups, initialize_groups

    local = launch.local_world_size if launch else 1
    if backends.device == "host":
        torch.set_num_threads(recipe.cluster.threads_per_rank or _threads(local))
    elif launch is not None:
        torch.cuda.set_device(launch.local_rank)
    timeout = datetime.timedelta(minutes=recipe.parallel.timeout_minutes)
    rank, size = (launch.rank, launch.world_size) if launch else (0, 1)
    store: dist.Store = dist.HashStore()
    if launch is not None:
        store, _, _ = next(dist.rendezvous(launch.rendezvous, rank, size, timeout=timeout))
    dist.init_process_group(
        backends.collectives,
        store=dist.PrefixStore("default_pg", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    started_here = os.environ.get(_RENDEZVOUS)
    fate = Path(started_here).with_name(_FATE) if started_here else None
    try:
        initialize_groups(recipe.parallel, recipe.run.seed, virtual_stages)
        with failures_told(store, rank, fate, Path(recipe.run.dir) / "logs"):
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


def spin_briefly() -> None:
    """How long idle CPU threads wait awake for the next operation; before torch is imported, as
    OpenMP reads it then.

    Threads that sleep between the many short operations of a small model take longer to wake than
    to work: a step of `tiny` on two cores 1.6 times as long. Those that never sleep keep the cores
    from each other as soon as another process wants one: steps became 4 times as long, single ones
    50 times. A thousand rounds cost 5 to 10 % of such a step, and with company make it 2 times as
    long. GNU's OpenMP takes the number for a process with more threads than cores, such as one
    that has read or written a checkpoint, from the policy: 1000 if it is ACTIVE, else 100, with
    which a step took 1.3 times as long. Who sets either variable knows better.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="ACTIVE", GOMP_SPINCOUNT="1000")


def _threads(local_ranks: int) -> int:
    """Threads of one rank: its share of the cores, or OMP_NUM_THREADS where that is less."""
    share = max(1, len(os.sched_getaffinity(0)) // local_ranks)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wanted)) if wanted.isdigit() and int(wanted) else share
