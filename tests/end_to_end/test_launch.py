"""Two ranks, started by the command itself, by torchrun and as srun does: the same run."""

import socket
import sys
from pathlib import Path

import pytest

from tests.end_to_end.training import Command, essence, records, train

TWO = ("parallel.data_parallel_size=2", "stage.train_steps=5", "checkpoint.save_interval=3")


@pytest.fixture(scope="module")
def by_itself(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    train(data, run, *TWO).run()
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5]
    return run


def test_torchrun(data: Path, by_itself: Path, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    options = ("--master-addr=127.0.0.1", f"--master-port={_free_port()}")
    command = train(data, tmp_path / "run", *TWO)
    Command(command.overrides, data, launcher=(*torchrun, *options)).run()
    assert essence(records(tmp_path / "run")) == essence(records(by_itself))


def test_srun(data: Path, by_itself: Path, tmp_path: Path) -> None:
    """One process a task, with the variables of a job step and no MASTER_ADDR."""
    port = _free_port()
    step = {
        # The port is made from the number of the job.
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x1)",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    command = train(data, tmp_path / "run", *TWO)
    tasks = [
        Command(
            command.overrides,
            data,
            environment=step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
        ).start()
        for task in range(2)
    ]
    for task in tasks:
        output, _ = task.communicate(timeout=100)
        assert task.returncode == 0, output
    assert essence(records(tmp_path / "run")) == essence(records(by_itself))
    assert (tmp_path / "run/logs/rank1.log").exists()


def test_ranks_that_do_not_fit_the_layout(data: Path, tmp_path: Path) -> None:
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "localhost"}
    command = train(data, tmp_path / "run", *TWO)
    message = Command(command.overrides, data, environment=step).refused()
    assert "3" in message and "parallel" in message


def _free_port() -> int:
    """A port of the range from which a job's port is taken, free now."""
    for port in range(20_000, 30_000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) != 0:
                return port
    raise AssertionError("no free port")
