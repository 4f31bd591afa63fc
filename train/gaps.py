"""Gaps between the losses of paired runs, and how uncertain they are. Plain numpy.

Series have one number a step, [n]; several pairs are stacked, [k, n]. What is not a number
(a step that is missing or not finite) is left out of every mean.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recipes.schema import OptimizerConfig, StageConfig
from recipes.stages import stage_length, tokens_after_steps
from train.optimizer import schedule_tokens

Series = NDArray[np.float64]
Mask = NDArray[np.bool_]

BLOCKS = 10
"""Blocks a window is cut into for its standard error."""

EARLY = 0.1
"""Share of a run that counts as early, if its warmup is not longer."""

LAST = "last quarter"
"""The window a verdict looks at."""


@dataclass(frozen=True)
class Estimate:
    """A mean over the steps of a window and over pairs of runs."""

    mean: float
    error: float | None
    """Standard error: the larger of what the steps within the pairs and what the pairs among
    each other say; None: too few of both."""
    low: float
    """Smallest mean of a pair."""
    high: float
    """Largest mean of a pair."""
    steps: int
    """Steps of the window that have a number in some pair."""
    pairs: int


@dataclass(frozen=True)
class Window:
    """A part of the run. A step belongs to it if it starts in it."""

    name: str
    start: float
    """First token."""
    end: float
    """Token after the last."""

    def mask(self, stage: StageConfig) -> Mask:
        """[n], whether a step belongs to the window."""
        starts = np.array([0, *tokens_after_steps(stage)[:-1]], dtype=float)
        return (starts >= self.start) & (starts < self.end)


def windows(optimizer: OptimizerConfig, stage: StageConfig) -> list[Window]:
    """Early, stable, decay and last quarter, as far as the run has them.

    Early is the warmup or a tenth of the run, whichever is longer. Decay is that of a WSD
    schedule, or everything after the early part for cosine and linear, which have nothing
    stable.
    """
    whole = float(stage_length(stage))
    warmup, decay, schedule = schedule_tokens(optimizer, stage)
    early = max(float(warmup), EARLY * whole)
    begin = {"WSD": float(schedule - decay), "constant": whole}.get(optimizer.lr_decay_style, early)
    begin = min(begin, whole)
    early = min(early, begin)
    parts = [
        Window("early", 0.0, early),
        Window("stable", early, begin),
        Window("decay", begin, whole),
        Window(LAST, 0.75 * whole, whole),
    ]
    return [w for w in parts if w.mask(stage).any()]


def relative_gap(arm: Series, base: Series) -> Series:
    """(arm - base) / base; positive is worse than the baseline."""
    return (arm - base) / base


def estimate(values: Series) -> Estimate | None:
    """Mean of [k, n] values of k pairs; None if there is no number at all."""
    rows = [row[np.isfinite(row)] for row in values]
    rows = [row for row in rows if row.size]
    if not rows:
        return None
    means = np.array([row.mean() for row in rows])
    within = [block_error(row) for row in rows]
    errors = []
    if None not in within:
        errors.append(math.sqrt(sum(e * e for e in within if e is not None)) / len(rows))
    if len(rows) > 1:
        errors.append(float(means.std(ddof=1)) / math.sqrt(len(rows)))
    return Estimate(
        mean=float(means.mean()),
        error=max(errors, default=None),
        low=float(means.min()),
        high=float(means.max()),
        steps=int(np.isfinite(values).any(axis=0).sum()),
        pairs=len(rows),
    )


def block_error(values: Series) -> float | None:
    """Standard error of the mean of one series [n] whose neighbours are alike.

    The series is cut into BLOCKS blocks (of at least two steps) whose means count as independent
    (Flyvbjerg and Petersen, J. Chem. Phys. 91, 461, 1989): right as long as what is correlated
    is shorter than a block. Never less than if all steps were independent, because a few short
    blocks may agree by chance. None below four steps.
    """
    blocks = min(BLOCKS, values.size // 2)
    if blocks < 2:
        return None
    means = np.array([block.mean() for block in np.array_split(values, blocks)])
    independent = float(values.std(ddof=1)) / math.sqrt(values.size)
    return max(float(means.std(ddof=1)) / math.sqrt(blocks), independent)


def spread(values: Series) -> float | None:
    """Standard deviation of k numbers relative to their mean; None below two."""
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1) / values.mean()) if values.size > 1 else None


def finite_mean(values: Series) -> float | None:
    """Mean of the numbers among any values; None if there is none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else None


def smooth(values: Series, width: int) -> Series:
    """Centred moving mean over `width` steps of [n], over fewer at the ends."""
    kernel = np.ones(min(width, values.size))
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    count = np.convolve(known.astype(float), kernel, "same")
    # Where a number is missing, none is invented.
    return np.divide(total, count, out=np.full(values.shape, np.nan), where=known & (count > 0.5))
