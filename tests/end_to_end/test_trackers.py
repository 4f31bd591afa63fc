"""A run that is stopped and resumed, as TensorBoard, wandb and the published schedule see it."""

import math
import signal
from pathlib import Path

import pytest

from tests.end_to_end.trackers import assert_shown_in_tensorboard, numbers, wandb_runs
from tests.end_to_end.training import end_with, records, train, wait_for_step

STEP = 4 * 64
"""Tokens of one step."""
WARMUP, DECAY, SCHEDULE = 3 * STEP, 7 * STEP, 16 * STEP
PEAK, MINIMUM = 4.5e-4, 4.5e-6


@pytest.fixture(scope="module")
def tracked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps, stopped by a signal on the way, of a schedule that is longer."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    command = train(
        data,
        run,
        "stage.train_steps=null",
        f"stage.train_tokens={11.7 * STEP}",  # the last step is begun, so it is done
        f"optimizer.lr={PEAK}",
        f"optimizer.min_lr={MINIMUM}",
        f"optimizer.lr_warmup_tokens={WARMUP}",
        f"optimizer.lr_wsd_decay_tokens={DECAY}",
        f"optimizer.lr_schedule_tokens={SCHEDULE}",
        "logging.tensorboard=true",
        "logging.wandb=offline",
    )
    process = command.start()
    wait_for_step(process, run, 5)
    end_with(process, signal.SIGTERM, code=3)
    assert 5 <= len(records(run)) < 12
    command.run()
    assert len(records(run)) == 12
    return run


def published(tokens: float) -> float:
    """Warmup-stable-decay with minus-sqrt decay: min + (1 - sqrt(x)) * (peak - min), where x is
    the progress of the decay (Nemotron 3 Super, section 2.4; Megatron's WSD)."""
    if tokens < WARMUP:
        return PEAK * tokens / WARMUP
    if tokens < SCHEDULE - DECAY:
        return PEAK
    progress = (tokens - (SCHEDULE - DECAY)) / DECAY
    return MINIMUM + (1 - math.sqrt(progress)) * (PEAK - MINIMUM)


def test_the_learning_rate_is_the_published_law(tracked: Path) -> None:
    lines = records(tracked)
    assert [r["tokens"] for r in lines] == [n * STEP for n in range(1, 13)]
    # An update is made with the rate at the tokens seen before it.
    expected = [published(n * STEP) for n in range(12)]
    assert [r["learning_rate"] for r in lines] == pytest.approx(expected, rel=1e-12)
    assert expected[0] == 0 and expected[3] == PEAK > expected[-1] > MINIMUM  # all three parts


def test_tensorboard_shows_each_step_once(tracked: Path) -> None:
    assert_shown_in_tensorboard(tracked)


def test_wandb_goes_on_with_the_same_run(tracked: Path) -> None:
    (first, before), (second, after) = wandb_runs(tracked)
    assert first == second != ""
    assert [*before, *after] == list(range(1, 13))
    for line in records(tracked):
        values = (before | after)[line["step"]]
        assert {k: v for k, v in values.items() if not k.startswith("_")} == numbers(line)
