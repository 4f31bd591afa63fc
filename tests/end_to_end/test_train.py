"""The main job as its user does it: train, be killed or stopped, go on, bit for bit."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.end_to_end.trackers import assert_shown_in_tensorboard
from tests.end_to_end.training import STEPS, end_with, essence, records, train, wait_for_step


def test_a_run_writes_what_its_user_needs(straight: Path) -> None:
    lines = records(straight)
    assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["validation_loss"] < lines[0]["loss"]
    assert len(lines[0]["mtp_loss"]) == 2 and len(lines[0]["max_violation"]) == 3
    assert 0.5 < lines[0]["load_balance_loss"] < 4
    assert 0 <= lines[0]["zero_grad_share"] < 1
    assert lines[-1]["tokens"] == STEPS * 4 * 64
    for name in ("config.yaml", "command.txt", "environment.json", "plots/curves.png"):
        assert (straight / name).stat().st_size > 0, name
    table = json.loads((straight / "environment.json").read_text())["backends"]
    assert {b["component"] for b in table} >= {"transformer_engine", "mamba_ssm", "CUDA runtime"}
    assert (straight / "checkpoints/latest").read_text().strip() == f"iter_{STEPS:07d}"


def test_killed_and_resumed_equals_straight(data: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train(data, run, "checkpoint.save_interval=6", "logging.tensorboard=true")
    process = command.start()
    wait_for_step(process, run, 8)
    process.kill()
    process.wait()
    assert (run / "checkpoints/latest").read_text().strip() == "iter_0000006"
    output = command.run()
    assert "resumed at step 6" in output
    assert essence(records(run)) == essence(records(straight))
    assert_shown_in_tensorboard(run)


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits(data: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data, run, "checkpoint.save_interval=6").run()
    assert essence(records(run)) == essence(records(straight))
    assert records(run)[-1]["validation_loss"] == records(straight)[-1]["validation_loss"]
    # Nothing is left to do, so the same command again changes nothing.
    lines = records(run)
    assert f"resumed at step {STEPS}" in train(data, run, "checkpoint.save_interval=6").run()
    assert records(run) == lines


@pytest.mark.slow  # test_signals.py has one while a checkpoint is written
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, data: Path, straight: Path, tmp_path: Path
) -> None:
    # With SIGUSR1 the signal comes while the run validates, which would take minutes.
    validating = number == signal.SIGUSR1
    evaluation = ("stage.eval_interval=3", "stage.eval_steps=2000") if validating else ()
    run = tmp_path / "run"
    process = train(data, run, *evaluation).start()
    wait_for_step(process, run, 2 if validating else 3)
    if validating:
        with pytest.raises(Exception, match="timed out"):  # step 3 is done, its line waits
            process.communicate(timeout=3)
    end_with(process, number, code=3)
    stopped = len(records(run))
    assert 3 <= stopped < STEPS
    assert (run / "checkpoints/latest").read_text().strip() == f"iter_{stopped:07d}"
    train(data, run).run()
    assert essence(records(run)) == essence(records(straight))


@pytest.mark.slow
def test_two_ranks_train_and_one_goes_on(data: Path, straight: Path, tmp_path: Path) -> None:
    """Stopped between an update and the forward pass that would have gathered it: the checkpoint
    must hold all of the update."""
    run = tmp_path / "run"
    overlapped = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    process = train(data, run, "parallel.data_parallel_size=2", *overlapped).start()
    wait_for_step(process, run, 3)
    end_with(process, signal.SIGTERM, code=3)
    stopped = len(records(run))
    assert 3 <= stopped < STEPS
    assert {p.name for p in (run / "logs").iterdir()} >= {"rank0.log", "rank1.log"}
    output = train(data, run).run()
    assert "layout changed" in output and f"resumed at step {stopped}" in output
    # Other sums in another order: BF16 rounding, not bits.
    for ours, theirs in zip(records(run), records(straight), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(data: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = run / f"checkpoints/iter_{STEPS:07d}"
    shard = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    more = ("checkpoint.save_interval=6", f"run.dir={run}")
    output = train(data, run, *more).run(code=2)
    assert shard.name in output and "checkpoint.allow_previous=true" in output
    assert "Traceback" not in output
    output = train(data, run, *more, "checkpoint.allow_previous=true").run()
    assert "resumed at step 6" in output
    assert essence(records(run)) == essence(records(straight))


def test_saving_in_the_background_changes_nothing(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ("checkpoint.async_save=true", "checkpoint.save_interval=2", "checkpoint.keep_every=6")
    train(data, run, *more, "stage.train_steps=10", "optimizer.lr_schedule_tokens=3072").run()
    train(data, run, *more, "optimizer.lr_schedule_tokens=3072").run()
    assert essence(records(run)) == essence(records(straight))
    kept = sorted(p.name for p in (run / "checkpoints").glob("iter_*"))
    assert kept == ["iter_0000006", "iter_0000010", "iter_0000012"]
