"""A node whose network is cut: the run goes on with the others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.jobs import STEPS, Submission, trained
from tests.cluster.lab import FOLDER, Lab, running, started
from tests.cluster.network import Namespaces

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three nodes in network namespaces."""
    assert not running(FOLDER), "a lab is running already; `make cluster-stop` ends it"
    reason = Namespaces.impossible()
    if reason:
        pytest.skip(f"a cable that can be cut needs network namespaces: {reason}")
    with started(Lab(FOLDER, network="netns")) as up:
        yield up


def test_a_node_that_is_cut_off(submission: Submission, straight: Path) -> None:
    wires = submission.lab.wires
    assert isinstance(wires, Namespaces)
    submission.submit()
    submission.wait_for_step(7)
    wires.cut("n2")
    try:
        assert submission.wait_for_end() == f"complete at step {STEPS}"
    finally:
        wires.mend("n2")
    assert submission.events()[-1]["nodes"] == "n[1,3]"
    assert trained(submission.run) == trained(straight)
