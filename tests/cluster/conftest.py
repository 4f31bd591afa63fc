"""What the tests on a real Slurm share: a cluster, a data set, a run nothing happened to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.jobs import SHAPE, Submission
from tests.cluster.lab import FOLDER, Lab, running, started
from tests.end_to_end.training import SMALL, Command, sources


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three nodes on ports of this machine."""
    assert not running(FOLDER), "a lab is running already; `make cluster-stop` ends it"
    with started(Lab(FOLDER)) as up:
        yield up


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder."""
    folder = tmp_path_factory.mktemp("data")
    Command([*SMALL, sources(folder)], folder, "data.prepare").run()
    return folder


@pytest.fixture(scope="session")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by itself, on this machine, without Slurm."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    one_thread = "cluster.threads_per_rank=1"
    Command([*SMALL, sources(data), f"run.dir={run}", *SHAPE, one_thread], data).run(timeout=600)
    return run


@pytest.fixture
def submission(lab: Lab, data: Path, tmp_path: Path) -> Iterator[Submission]:
    """A run directory of its own; whatever is still queued at the end is cancelled."""
    yield Submission(lab, data, tmp_path / "run")
    lab.call("scancel", "--user=root")
    lab.wait_idle()
