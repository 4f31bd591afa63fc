"""What can happen to a run of weeks, on a real Slurm: it goes on, or ends for a reason."""

import json
import math
import signal
import sys
from pathlib import Path

import pytest

from tests.cluster.jobs import STEPS, Submission, trained
from tests.end_to_end.training import records

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3000)]


def complete(submission: Submission, straight: Path) -> None:
    """The chain ends by itself with the metrics of a run nothing happened to."""
    assert submission.wait_for_end() == f"complete at step {STEPS}"
    assert trained(submission.run) == trained(straight)


def test_time_limit(submission: Submission, straight: Path) -> None:
    """Slurm's own warning: a minute and a half of training in starts of one minute."""
    step = min(r["seconds"] for r in records(straight))  # of two micro batches
    steps = math.ceil(90 / (8 * step))
    longer = [f"stage.train_steps={steps}", "stage.global_batch_size=64"]
    longer.append("checkpoint.save_interval=null")
    own = Submission(submission.lab, submission.data, submission.run.parent / "straight")
    own.command(*longer, "cluster.threads_per_rank=1", module="train").run(timeout=1000)
    limit = ["cluster.time_limit='1'", "cluster.warning_seconds=15", "cluster.max_strikes=10"]
    submission.submit(*longer, *limit)
    assert submission.wait_for_end(seconds=1500) == f"complete at step {steps}"
    requeued = submission.reasons("requeue")
    assert len(requeued) >= 2 and set(requeued) == {"time limit"}
    assert trained(submission.run) == trained(own.run)


def test_preempted_by_another_partition(submission: Submission, straight: Path) -> None:
    submission.submit()
    submission.wait_for_step(3)
    wrap = [
        "--partition=urgent",
        "--nodes=3",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 2",
    ]
    submission.lab.call("sbatch", *wrap)
    complete(submission, straight)
    assert submission.reasons("requeue") == ["preempted, or requeued from outside"]
    assert not (submission.run / "strikes").exists()


@pytest.mark.parametrize("background", [False, True])
def test_a_killed_rank(background: bool, submission: Submission, straight: Path) -> None:
    job = submission.submit(f"checkpoint.async_save={str(background).lower()}")
    submission.wait_for_step(7)
    submission.ranks(job)[3].kill()
    complete(submission, straight)
    (reason,) = submission.reasons("requeue")
    assert reason.startswith("the ranks ended with exit code")


def test_a_hung_rank(submission: Submission, straight: Path) -> None:
    """The other ranks' collective gives up and ends them, and Slurm the one that hangs."""
    job = submission.submit("parallel.timeout_minutes=0.5")
    submission.wait_for_step(7)
    submission.ranks(job)[2].send_signal(signal.SIGSTOP)
    complete(submission, straight)
    (reason,) = submission.reasons("requeue")
    assert reason.startswith("the ranks ended with exit code")


def test_a_crash_loop_ends(submission: Submission) -> None:
    job = submission.submit("cluster.python=/bin/false", "cluster.health.enabled=false")
    reason = submission.wait_for_end()
    assert reason.startswith("gave up after 3 failures without a new checkpoint")
    assert len(submission.reasons("start")) == 3
    assert (submission.run / "strikes").read_text() == "3\n"
    submission.until(lambda: submission.lab.call("squeue", "-h") == "", "an empty queue")
    assert "ExitCode=1:0" in submission.lab.call("scontrol", "show", "job", job)


def test_a_stop_by_the_loss_guard_is_for_good(submission: Submission) -> None:
    wild = ["optimizer.lr=1e30", "optimizer.min_lr=1", "optimizer.lr_warmup_fraction=0"]
    submission.submit(*wild)
    assert submission.wait_for_end().startswith("stopped: loss or gradient of step")
    assert submission.reasons("requeue") == []
    assert "stopped: loss" in submission.status()


def test_a_bad_node_is_named_and_left_out(
    submission: Submission, straight: Path, tmp_path: Path
) -> None:
    """A GPU tool that finds n1 too hot; the ranks themselves need none."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/bash\n"
        'heat=40; [ "$SLURMD_NODENAME" = n1 ] && heat=99\n'
        'for i in 0 1; do echo "$i, $heat, 12, [N/A], Not Active"; done\n'
    )
    tool.chmod(0o755)
    path = f"{{name: PATH, value: '{tool.parent}:/usr/sbin:/usr/bin:/sbin:/bin', why: fake GPUs}}"
    gpus = ["cluster.gpus_per_node=2", "cluster.request_gpus=false", "device=host"]
    all_reduce = ["cluster.health.all_reduce_mb=1", f"cluster.environment=[{path}]"]
    submission.submit(*gpus, *all_reduce)
    complete(submission, straight)
    assert submission.reasons("requeue") == ["bad nodes: n1"]
    hot = "n1\tGPU 0 has 99 C, more than 85; GPU 1 has 99 C, more than 85\n"
    assert (submission.run / "bad-nodes").read_text() == hot
    assert submission.events()[-1]["nodes"] == "n[2-3]"
    assert "bad nodes  n1: GPU 0 has 99 C" in submission.status()
    script = submission.command("dry_run=true", f"stage.train_steps={STEPS + 1}").run()
    assert "#SBATCH --exclude=n1\n" in script
    (submission.run / "bad-nodes").write_text("")  # repaired
    script = submission.command("dry_run=true", f"stage.train_steps={STEPS + 1}").run()
    assert "--exclude" not in script


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_node_that_cannot_reduce_is_found(
    submission: Submission, straight: Path, tmp_path: Path, nodes: int
) -> None:
    """n1 answers the checks but fails in the all-reduce: found alone, or in a ring of pairs."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        '[ "$SLURMD_NODENAME" = n1 ] && [[ "$*" == *all_reduce* ]] && exit 1\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    faulty = [f"cluster.python={python}", "cluster.health.all_reduce_mb=1"]
    if nodes == 3:  # no third node is left, so this job waits
        three = ["cluster.ranks_per_node=1", "parallel.data_parallel_size=3"]
        job = submission.submit(*faulty, *three, "stage.global_batch_size=6")
        submission.until(lambda: bool(submission.reasons("requeue")), "the requeue")
        submission.lab.call("scancel", job)
    else:
        submission.submit(*faulty)
        complete(submission, straight)
        assert submission.events()[-1]["nodes"] == "n[2-3]"
    assert submission.reasons("requeue") == ["bad nodes: n1"]
    line = (submission.run / "bad-nodes").read_text()
    assert line == "n1\tfails the all-reduce with every neighbour, or alone\n"
    assert not (submission.run / "strikes").exists()


def test_torchrun(submission: Submission, straight: Path) -> None:
    """In a folder whose name needs quotes wherever it is written."""
    submission.run = submission.run.parent / "a run's"
    job = submission.submit("cluster.launcher=torchrun")
    submission.wait_for_step(3)
    submission.warn(job)
    complete(submission, straight)
    assert submission.reasons("requeue") == ["time limit"]


def test_resume_extend_and_another_layout(submission: Submission) -> None:
    """Cancelled, submitted again on one node with other ranks, then made longer."""
    job = submission.submit()
    submission.wait_for_step(3)
    submission.lab.call("scancel", job)
    assert submission.wait_for_end() == "cancelled"
    submission.until(lambda: submission.lab.call("squeue", "-h") == "", "an empty queue")
    submission.submit("parallel.data_parallel_size=2")
    submission.until(lambda: len(submission.reasons("end")) == 2, "the second end")
    assert submission.events()[-1]["nodes"] == "n1"
    assert "is complete at step" in submission.command("parallel.data_parallel_size=2").refused()
    longer = ["parallel.data_parallel_size=2", f"stage.train_steps={STEPS + 2}"]
    submission.submit(*longer)
    submission.until(lambda: len(submission.reasons("end")) == 3, "the third end")
    assert submission.reasons("end")[1:] == [f"complete at step {n}" for n in (STEPS, STEPS + 2)]
    assert [r["step"] for r in records(submission.run)] == list(range(1, STEPS + 3))


def test_a_comparison_is_an_array_and_a_report(submission: Submission) -> None:
    short = ["parallel.data_parallel_size=2", "stage.train_steps=8"]
    precisions = "compare.precisions=[bf16,nvfp4]"
    array = submission.submit(*short, precisions, "compare.budget=10")
    submission.until((submission.run / "report.json").exists, "the report")
    report = json.loads((submission.run / "report.json").read_text())
    assert report
    for arm in ("bf16-1234", "nvfp4-1234"):
        one = Submission(submission.lab, submission.data, submission.run / "arms" / arm)
        assert one.wait_for_end() == "complete at step 8"
        assert {e["task"].split("_")[0] for e in one.events()} == {array}
        assert "complete at step 8" in one.status()
    submission.until(lambda: submission.lab.call("squeue", "-h") == "", "an empty queue")


def test_a_sweep_is_an_array(submission: Submission) -> None:
    """A warned run of it goes on, and the other one is left alone."""
    short = ["parallel.data_parallel_size=2", "stage.train_steps=20"]
    array = submission.submit("--multirun", *short, "optimizer.lr=1e-3,2e-3")
    arms = [
        Submission(submission.lab, submission.data, submission.run / "arms" / f"lr-{lr}")
        for lr in ("0.001", "0.002")
    ]
    arms[0].wait_for_step(2)
    submission.warn(f"{array}_0")
    for number, (one, lr) in enumerate(zip(arms, (0.001, 0.002), strict=True)):
        assert one.wait_for_end() == "complete at step 20"
        assert {e["task"] for e in one.events()} == {f"{array}_{number}"}
        assert one.reasons("requeue") == ["time limit"] * (number == 0)
        assert max(r["learning_rate"] for r in records(one.run)) <= lr
    said = submission.status().splitlines()
    assert [line.split()[0] for line in said] == ["run", "lr-0.001", "lr-0.002"]
    assert all("complete at step 20" in line for line in said[1:])
