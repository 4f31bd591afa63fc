"""The numbers of a comparison: windows of the schedule, means and their errors, smoothing."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from tests.unit.run_directories import Workbench
from train.finished import read_run
from train.gaps import block_error, estimate, smooth, windows


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def test_windows_of_the_schedule(bench: Workbench) -> None:
    """Warmup 4 % and decay 20 % of 200 steps: the early window is the first tenth."""
    bench.run()
    run = read_run(bench.runs[0].folder)
    steps = {
        w.name: np.flatnonzero(w.mask(run.stage)) + 1 for w in windows(run.optimizer, run.stage)
    }
    first_and_last = {name: (int(s[0]), int(s[-1])) for name, s in steps.items()}
    assert first_and_last == {
        "early": (1, 20),
        "stable": (21, 160),
        "decay": (161, 200),
        "last quarter": (151, 200),
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.lr_warmup_fraction=0.3"], {"early": 60, "stable": 100, "decay": 40}),
        (["optimizer.lr_decay_style=cosine"], {"early": 20, "decay": 180}),
        (["optimizer.lr_decay_style=constant"], {"early": 20, "stable": 180}),
        # The schedule is longer than the run: its decay is not reached.
        (["optimizer.lr_schedule_tokens=819200"], {"early": 20, "stable": 180}),
        (["optimizer.lr_wsd_decay_tokens=20480"], {"early": 20, "stable": 170, "decay": 10}),
    ],
)
def test_windows_of_other_schedules(
    bench: Workbench, overrides: list[str], expected: dict[str, int]
) -> None:
    bench.run(overrides=tuple(overrides))
    run = read_run(bench.runs[0].folder)
    found = {w.name: int(w.mask(run.stage).sum()) for w in windows(run.optimizer, run.stage)}
    assert found == {**expected, "last quarter": 50}


def test_the_error_takes_neighbours_that_are_alike_into_account() -> None:
    """AR(1), x' = r x + e, has mean of variance 1 / (n (1 - r)^2) for unit noise and large n."""
    generator, steps, r = np.random.default_rng(0), 2000, 0.9
    true = math.sqrt(1 / (steps * (1 - r) ** 2))
    found, naive = [], []
    for _ in range(100):
        noise, series, x = generator.normal(size=steps + 200), [], 0.0
        for e in noise:
            x = r * x + e
            series.append(x)
        kept = np.array(series[200:])
        found.append(block_error(kept) or 0.0)
        naive.append(statistics.stdev(kept.tolist()) / math.sqrt(steps))
    assert statistics.fmean(found) == pytest.approx(true, rel=0.15)
    assert statistics.fmean(naive) < true / 3


def test_seeds_that_disagree_widen_the_error() -> None:
    """Four pairs without noise inside: the error is that of four numbers."""
    means = [0.001, 0.004, 0.002, 0.005]
    found = estimate(np.repeat(np.array(means)[:, None], 40, axis=1))
    assert found is not None and found.error is not None
    assert found.error == pytest.approx(statistics.stdev(means) / 2)
    assert (found.low, found.high) == (0.001, 0.005)
    assert found.pairs == 4


def test_too_few_steps_have_no_error() -> None:
    assert block_error(np.array([1.0, 2.0, 3.0])) is None
    found = estimate(np.array([[1.0, np.nan, 3.0]]))
    assert found is not None
    assert (found.mean, found.error, found.steps) == (2.0, None, 2)
    assert estimate(np.full((2, 3), np.nan)) is None


def test_smoothing_keeps_a_line_and_invents_nothing() -> None:
    line = np.arange(20.0)
    assert smooth(line, 5)[2:-2] == pytest.approx(line[2:-2])
    assert smooth(line, 5)[0] == pytest.approx((0 + 1 + 2) / 3)
    line[7] = np.nan
    assert np.isnan(smooth(line, 5)).tolist() == [i == 7 for i in range(20)]
    assert smooth(line, 5)[8] == pytest.approx((6 + 8 + 9 + 10) / 4)


def test_steps_that_alternate_are_no_more_certain_than_independent_ones() -> None:
    """Blocks of two steps agree exactly, and would say that there is no error."""
    values = [0.01, -0.01] * 5
    expected = statistics.stdev(values) / math.sqrt(10)
    assert block_error(np.array(values)) == pytest.approx(expected)
