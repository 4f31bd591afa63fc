"""Stages as their user runs them: one command through all of them, killed anywhere, bit for bit."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.training import (
    Command,
    end_with,
    essence,
    records,
    train,
    wait_for_step,
)

CONSTANT = "optimizer: {lr_decay_style: constant, lr: 1e-3, min_lr: 1e-3, lr_warmup_fraction: 0}"
MIX = "[{share: 0.5, sequence_length: 32, global_batch_size: 8, micro_batch_size: 4}]"
STAGES = (
    "stages.phase1.stage.train_steps=3",
    "stages.phase2.stage.train_steps=3",
    "stages.long={" + CONSTANT + ", stage: {train_steps: 4, sequence_length: 128, "
    "global_batch_size: 2, micro_batch_size: 1, mix: " + MIX + "}}",
)
"""Two stages of one law and one blend, then two lengths in turn at a constant rate."""

LONG = 500
"""Seconds for a run of several starts on a busy machine."""

TOKENS = 256
"""Of every step."""


def staged(data: Path, run: Path, *overrides: str) -> Command:
    return train(
        data, run, *STAGES, "checkpoint.save_interval=2", "stage.train_steps=1", *overrides
    )


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nothing happened to."""
    run = tmp_path_factory.mktemp("staged") / "run"
    staged(data, run).run(timeout=LONG)
    return run


def law(tokens: int) -> float:
    """Warmup over 4 % and minus-sqrt decay over the last 20 % of six steps, from tiny's rates; then
    the constant. Written down from the definition."""
    whole, high, low = 6 * TOKENS, 6e-3, 6e-5
    warmup, decay = int(0.04 * whole), int(0.2 * whole)
    if tokens >= whole:
        return 1e-3
    if tokens <= warmup:
        return high * tokens / warmup
    progress = max(0.0, (tokens - (whole - decay)) / decay)
    return low + (1 - math.sqrt(progress)) * (high - low)


def test_one_command_goes_through_all_stages(whole: Path) -> None:
    lines = records(whole)
    assert [r["step"] for r in lines] == list(range(1, 11))
    assert [r["stage"] for r in lines] == ["phase1"] * 3 + ["phase2"] * 3 + ["long"] * 4
    assert [r["tokens"] for r in lines] == [TOKENS * n for n in range(1, 11)]
    in_stage = [*range(1, 4), *range(1, 4), *range(1, 5)]
    assert [r["stage_tokens"] for r in lines] == [TOKENS * n for n in in_stage]
    assert [r["sequence_length"] for r in lines] == [64] * 6 + [128, 32, 128, 32]
    for i, line in enumerate(lines):
        assert line["learning_rate"] == pytest.approx(law(i * TOKENS), rel=1e-12), line["step"]
    assert lines[5]["loss"] < lines[0]["loss"]
    assert [i + 1 for i, r in enumerate(lines) if "validation_loss" in r] == [3, 6, 10]
    kept = {p.name for p in (whole / "checkpoints").glob("iter_*")}
    assert kept == {"iter_0000003", "iter_0000006", "iter_0000008", "iter_0000010"}
    assert (whole / "complete").read_text() == "10\n" and not (whole / "waiting").exists()
    meta = json.loads((whole / "checkpoints/iter_0000008/meta.json").read_text())
    assert meta["stage"] == {"name": "long", "first_step": 6, "first_tokens": 6 * TOKENS}
    assert meta["progress"] == {
        "step": 8,
        "consumed_samples": 6 * 4 + 2 + 8,
        "consumed_tokens": 8 * TOKENS,
    }


def cut_back(whole: Path, run: Path, step: int) -> None:
    """A run as a kill leaves it when its newest checkpoint is that of a step, some steps later."""
    shutil.copytree(whole, run)
    (run / "complete").unlink()
    (run / "checkpoints/latest").write_text(f"iter_{step:07d}\n")
    for later in (run / "checkpoints").glob("iter_*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)


@pytest.mark.slow
def test_killed_in_the_second_stage(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = staged(data, run).start()
    wait_for_step(process, run, 5, seconds=400)
    process.kill()
    process.wait()
    saved = int((run / "checkpoints/latest").read_text().strip()[5:])
    assert saved in (4, 6)  # at 4, or the signal came late
    assert f"resumed at step {saved}, stage " in staged(data, run).run(timeout=LONG)
    assert essence(records(run)) == essence(records(whole))


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, marks=pytest.mark.slow, id="at a boundary"),
        pytest.param(6, marks=pytest.mark.slow, id="at the next"),
        pytest.param(8, marks=pytest.mark.slow, id="within a mix"),
    ],
)
def test_killed_elsewhere(step: int, data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cut_back(whole, run, step)
    assert f"resumed at step {step}, " in staged(data, run).run(timeout=LONG)
    assert essence(records(run)) == essence(records(whole))


@pytest.mark.slow
def test_two_equal_stages_are_one_long_one(data: Path, whole: Path, tmp_path: Path) -> None:
    """Weights, moments, router biases, random states and the data go on over the boundary."""
    run = tmp_path / "run"
    train(data, run, "stage.train_steps=6").run(timeout=LONG)
    own = ("stage", "stage_tokens", "sequence_length")
    wanted = [{k: v for k, v in r.items() if k not in own} for r in records(whole)[:6]]
    assert essence(records(run)) == essence(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["nvfp4"])
def test_stochastic_rounding_goes_on(precision: str, data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = (f"precision={precision}", "precision.protected_layers=last 1")
    train(data, one, *more, "stage.train_steps=4").run(timeout=LONG)
    stages = ("stages.a.stage.train_steps=2", "stages.b.stage.train_steps=2")
    train(data, two, *more, *stages, "stage.train_steps=1").run(timeout=LONG)
    own = ("stage", "stage_tokens", "sequence_length")
    found = [{k: v for k, v in r.items() if k not in own} for r in records(two)]
    assert essence(found) == essence(records(one))


@pytest.mark.slow
def test_precision_and_layout_change_between_stages(data: Path, tmp_path: Path) -> None:
    """BF16 on one rank, then NVFP4 on two, then two with the sequence split."""
    run = tmp_path / "run"
    nvfp4 = "precision: nvfp4, precision.protected_layers: last 1"
    two = "parallel.data_parallel_size: 2, stage.micro_batch_size: 2"
    cp = "parallel: {context_parallel_size: 2, mamba_context: state}"
    command = train(
        data,
        run,
        "stage.train_steps=2",
        "stages.one={}",
        "stages.two={" + two + ", " + nvfp4 + "}",
        "stages.three={" + cp + ", " + nvfp4 + "}",
    )
    output = command.run(timeout=LONG)
    assert output.count("layout changed") == 2
    lines = records(run)
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(r["loss"]) for r in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    applied = json.loads((run / "precision.json").read_text())["applied"]
    assert applied[0]["from_step"] == 1 and applied[1]["from_step"] == 3
    again = run.with_name("again")
    process = Command([o.replace(str(run), str(again)) for o in command.overrides], data).start()
    wait_for_step(process, again, 5, seconds=400)
    end_with(process, signal.SIGKILL, -9)
    Command([o.replace(str(run), str(again)) for o in command.overrides], data).run(timeout=LONG)
    assert essence(records(again)) == essence(lines)


@pytest.mark.slow
def test_launched_ranks_go_on_or_say_what_the_next_stage_needs(data: Path, tmp_path: Path) -> None:
    """Under torchrun: two stages on its two ranks, then one that needs one rank alone."""
    run = tmp_path / "run"
    two = "parallel.data_parallel_size: 2, stage.micro_batch_size: 2"
    overrides = (
        "stage.train_steps=2",
        "stages.one={" + two + "}",
        "stages.two={" + two + "}",
        "stages.three={parallel.data_parallel_size: 1}",
    )
    alone = train(data, run, *overrides)
    launcher = (*alone.launcher, "-m", "torch.distributed.run", "--nproc-per-node=2")
    launched = Command(alone.overrides, data, launcher=(*launcher, "--standalone"))
    # torchrun makes 1 of every exit code; the file says what happened.
    output = launched.run(code=1, timeout=LONG)
    assert [r["stage"] for r in records(run)] == ["one", "one", "two", "two"]
    said = (run / "waiting").read_text()
    assert said.startswith("stage two is done; stage three ") and said.strip() in output
    assert not (run / "complete").exists()
    assert "stage three (3 of 3" in alone.run(timeout=LONG)
    assert (run / "complete").exists() and not (run / "waiting").exists()


def changed(data: Path, whole: Path, tmp_path: Path, *overrides: str) -> str:
    run = tmp_path / "run"
    if not run.exists():
        shutil.copytree(whole, run)
    return staged(data, run, *overrides).refused()


@pytest.mark.slow
def test_what_is_done_cannot_change(data: Path, whole: Path, tmp_path: Path) -> None:
    text = changed(data, whole, tmp_path, "stages.phase1.optimizer.weight_decay=0.3")
    assert "stages.phase1.optimizer.weight_decay" in text
    # The steps after it would be another stage's.
    text = changed(data, whole, tmp_path, "stages.phase1.stage.train_steps=4")
    assert "is of stage" in text and "restore the lengths of the stages before" in text
    text = changed(data, whole, tmp_path, "stages=null")
    assert "stages" in text


@pytest.mark.slow
def test_a_stage_can_be_added_to_a_run_that_is_complete(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    more: dict[str, Any] = {"last": "{stage.train_steps: 2, optimizer.lr: 1e-4}"}
    output = staged(data, run, *(f"stages.{k}={v}" for k, v in more.items())).run(timeout=LONG)
    assert "stage last (4 of 4" in output
    assert essence(records(run))[:10] == essence(records(whole))
    assert records(run)[-1]["stage"] == "last" and records(run)[-1]["step"] == 12


@pytest.mark.slow
def test_one_stage_alone_from_the_weights_of_another_run(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    load = whole / "checkpoints/iter_0000006"
    output = staged(data, run, "run.stage=long", f"checkpoint.load={load}").run(timeout=LONG)
    assert f"weights of {load}" in output
    lines = records(run)
    assert [r["step"] for r in lines] == [1, 2, 3, 4] and "stage" not in lines[0]
    assert [r["sequence_length"] for r in lines] == [128, 32, 128, 32]
    assert lines[0]["loss"] == pytest.approx(records(whole)[6]["loss"], rel=0.05)
