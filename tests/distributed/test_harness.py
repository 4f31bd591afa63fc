"""The harness itself: values by rank, the first traceback, bounded time, nothing left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, run_distributed


def add_up(rank: int, world_size: int, offset: int) -> tuple[int, int, int]:
    x = torch.tensor(rank + offset)
    dist.all_reduce(x)
    print(f"sum is {int(x)}")
    return rank, world_size, int(x)


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("only this rank is to blame")
    dist.barrier()  # fails or hangs because rank 1 never comes


def die_on_rank_0(rank: int, world_size: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_rank_1(rank: int, world_size: int, folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / f"{rank}.pids").write_text(f"{os.getpid()} {child.pid}")
    if rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    dist.barrier()


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def see_environment(rank: int, world_size: int) -> tuple[str | None, str, int]:
    return os.environ.get("STRATA_TEST"), os.environ["RANK"], torch.get_num_threads()


def is_running(pid: int) -> bool:
    """Whether a process lives; one that has ended but was not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_values_come_back_by_rank_and_output_has_its_rank(capfd: pytest.CaptureFixture[str]):
    assert run_distributed(add_up, 3, 10) == [(0, 3, 33), (1, 3, 33), (2, 3, 33)]
    lines = capfd.readouterr().out.splitlines()
    assert {f"[rank {rank}] sum is 33" for rank in range(3)} <= set(lines)


def test_one_rank():
    assert run_distributed(add_up, 1, 7) == [(0, 1, 7)]


def test_the_traceback_is_that_of_the_rank_to_blame():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 raised first") as error:
        run_distributed(fail_on_rank_1, 2, timeout=60)
    assert 'raise ValueError("only this rank is to blame")' in str(error.value)
    assert time.monotonic() - start < 30, "a failure must not wait for the time limit"


def test_a_killed_rank_is_named():
    with pytest.raises(RankError, match="rank 0 ended with exit code -9"):
        run_distributed(die_on_rank_0, 2, timeout=60)


def test_a_hang_ends_in_bounded_time_says_where_and_leaves_nothing(tmp_path: Path):
    start = time.monotonic()
    with pytest.raises(RankError, match="did not end within 5 s") as error:
        run_distributed(hang_on_rank_1, 2, tmp_path, timeout=5)
    assert time.monotonic() - start < 40
    hanging = [line for line in str(error.value).splitlines() if "in hang_on_rank_1" in line]
    assert {line.split("]")[0] for line in hanging} == {"[rank 0", "[rank 1"}
    pids = [int(p) for file in tmp_path.glob("*.pids") for p in file.read_text().split()]
    assert len(pids) == 4
    # The kernel needs a moment to end a killed process.
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_a_value_that_cannot_be_sent_is_an_error():
    with pytest.raises(RankError, match="pickle"):
        run_distributed(unpicklable, 1)


def test_ranks_see_the_environment_of_the_test(monkeypatch: pytest.MonkeyPatch):
    run_distributed(add_up, 1, 0)  # the server is up before the environment changes
    monkeypatch.setenv("STRATA_TEST", "here")
    assert run_distributed(see_environment, 2) == [("here", "0", 1), ("here", "1", 1)]
