"""Launchers' variables, as torchrun and srun set them."""

import pytest

from recipes.errors import ConfigError
from train.world import Launch, first_node, launched

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [*NAMES, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)


def under(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Launch | None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return launched()


# Task 9 of a step over nodes with 4, 4 and 3 tasks, as srun describes it (man srun).
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "11",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
}


def test_nobody_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    # A batch script is not a task of its job.
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert under(monkeypatch, **batch, SLURM_TASKS_PER_NODE="8") is None


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    values = ("5", "8", "1", "4", "host", "29500")
    assert under(monkeypatch, **dict(zip(NAMES, values, strict=True))) == Launch(
        5, 8, 1, 4, "env://"
    )


def test_srun_finds_its_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert under(monkeypatch, **STEP) == Launch(9, 11, 1, 3, "tcp://gpu07:23458")


def test_srun_with_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = under(monkeypatch, **STEP, MASTER_ADDR="10.0.0.1", MASTER_PORT="4000")
    assert launch is not None and launch.rendezvous == "tcp://10.0.0.1:4000"


def test_an_address_makes_tasks_of_variables_without_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variables = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "4000"}
    launch = under(monkeypatch, **variables, **address, SLURM_NTASKS_PER_NODE="2")
    assert launch == Launch(1, 2, 1, 2, "tcp://localhost:4000")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("n1,n2", "n1"),
        ("gpu[03-07,12],cpu1", "gpu03"),
        ("rack2-n[9,11]", "rack2-n9"),
        ("a[1-2]-ib,b", "a1-ib"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not; start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "MASTER_PORT is not"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "cannot be read"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "start the ranks with srun"),
    ],
)
def test_half_a_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        under(monkeypatch, **variables)
