"""About two minutes on a real Slurm: what continuous integration runs."""

from pathlib import Path

import pytest

from tests.cluster.jobs import STEPS, Submission, trained
from tests.end_to_end.training import records

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_warned_twice_it_goes_on_bit_for_bit(submission: Submission, straight: Path) -> None:
    """With processes that save beside the ranks of two nodes."""
    job = submission.submit("checkpoint.async_save=true")
    submission.wait_for_step(3)
    assert f"running: job {job} on n[1-2]" in submission.status()
    submission.warn(job)
    submission.wait_for_step(15, starts=2)
    submission.warn(job)
    assert submission.wait_for_end() == f"complete at step {STEPS}"
    assert submission.reasons("requeue") == ["time limit", "time limit"]
    assert {e["job"] for e in submission.events()} == {job}
    assert trained(submission.run) == trained(straight)
    assert (submission.run / "complete").read_text() == f"{STEPS}\n"
    logs = submission.run / "logs"
    assert sorted(p.name for p in logs.glob("rank*.log")) == [f"rank{i}.log" for i in range(4)]
    assert "resumed at step" in (logs / "rank0.log").read_text()
    assert f"complete at step {STEPS}" in submission.status()


def test_a_bad_recipe_is_refused_and_nothing_is_queued(submission: Submission) -> None:
    message = submission.command("stage.global_batch_size=6").refused()
    assert "stage.global_batch_size=6 is not a multiple" in message
    assert "invalid partition" in submission.command("cluster.partition=nowhere").refused()
    assert submission.lab.call("squeue", "--noheader") == ""
    assert not list(submission.run.glob("slurm/*"))


def test_scancel_leaves_a_usable_checkpoint(submission: Submission, straight: Path) -> None:
    job = submission.submit("checkpoint.save_interval=null")
    submission.wait_for_step(3)
    assert f"job {job} of run.dir" in submission.command().refused()  # two at once
    submission.lab.call("scancel", job)
    assert submission.wait_for_end() == "cancelled"
    submission.until(lambda: submission.lab.call("squeue", "-h") == "", "an empty queue")
    done = records(submission.run)
    assert (submission.run / "checkpoints/latest").read_text() == f"iter_{done[-1]['step']:07d}\n"
    assert trained(submission.run) == trained(straight)[: len(done)]
    assert "ended: cancelled" in submission.status()
