"""The pictures of a comparison: loss gap, losses, values flushed to zero."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.stages import tokens_after_steps
from train.comparison import Comparison
from train.finished import FinishedRun
from train.gaps import LAST, Series, smooth
from train.heat_map import draw

SHADES = {"early": "0.88", "stable": "1.0", "decay": "0.94"}
"""Window -> grey of its background."""


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw plots/loss_gap.png, plots/loss.png, and plots/flushed-NAME.png of the baseline
    and each arm with telemetry.

    Returns:
        The pictures, in the order to show them.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        _gaps(comparison, folder / "loss_gap.png"),
        _losses(comparison, folder / "loss.png"),
    ]
    for name in comparison.runs:
        if flushed := comparison.flushed(name):
            file = f"flushed-{re.sub(r'\W+', '-', name)}.png"
            paths.append(draw(name, flushed, folder / file))
    return paths


def _gaps(comparison: Comparison, path: Path) -> Path:
    """Smoothed relative gap of each arm, with the band between its pairs."""
    figure, axes = _figure(comparison)
    x, width = _tokens(comparison.base[0])
    for i, arm in enumerate(comparison.arms):
        curves = np.stack([100 * smooth(pair.gap("loss"), width) for pair in arm.pairs])
        color = f"C{i}"
        known = np.isfinite(curves).any(axis=0)
        label = f"{arm.name}, {len(arm.pairs)} seed{'s' * (len(arm.pairs) > 1)}"
        mean = np.nanmean(curves[:, known], axis=0)
        axes.plot(x[known], mean, color=color, label=label)
        if len(curves) > 1:
            low, high = (f(curves[:, known], axis=0) for f in (np.nanmin, np.nanmax))
            axes.fill_between(x[known], low, high, color=color, alpha=0.25, linewidth=0)
        checked = np.stack([100 * pair.gap("validation_loss") for pair in arm.pairs])
        at = np.isfinite(checked).any(axis=0)
        held_out = np.nanmean(checked[:, at], axis=0)
        axes.plot(x[at], held_out, "o", color=color, markersize=5, label=f"{arm.name}, held-out")
    axes.axhline(0, color="0.4", linewidth=0.8)
    budget = 100 * comparison.budget
    begin = next((w.start / 1e6 for w in comparison.windows if w.name == LAST), 0.0)
    axes.hlines(budget, begin, x[-1], color="firebrick", linestyle="--", label="budget")
    axes.set_ylabel(f"loss gap to {comparison.base_name} (%)")
    axes.set_title(
        f"Relative loss gap, mean over {width} steps; band: between seeds", fontsize=11, pad=18
    )
    return _save(figure, axes, path)


def _losses(comparison: Comparison, path: Path) -> Path:
    """Smoothed training losses, held-out losses as dots; mean over the runs of each arm."""
    figure, axes = _figure(comparison)
    x, width = _tokens(comparison.base[0])
    for i, (name, runs) in enumerate(comparison.runs.items()):
        # The first arm has the first colour in every picture; the baseline is black.
        color = "black" if i == 0 else f"C{i - 1}"
        loss = smooth(_mean(runs, "loss"), width)
        axes.plot(x, loss, color=color, linewidth=1.2, label=name)
        checked = _mean(runs, "validation_loss")
        at = np.isfinite(checked)
        axes.plot(x[at], checked[at], "o", color=color, markersize=5, label=f"{name}, held-out")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Loss, mean over {width} steps and all seeds", fontsize=11, pad=18)
    return _save(figure, axes, path)


def _mean(runs: Sequence[FinishedRun], key: str) -> Series:
    """[n], mean over the runs that have a number."""
    values = np.stack([run.series(key) for run in runs])
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _tokens(run: FinishedRun) -> tuple[Series, int]:
    """Millions of tokens at the end of each step, and an odd smoothing width of about 1/20."""
    steps = run.series("loss").size
    return np.array(tokens_after_steps(run.stage)) / 1e6, steps // 20 | 1


def _figure(comparison: Comparison) -> tuple[Any, Any]:
    """A picture with the windows of the schedule in its background."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for window in comparison.windows:
        if window.name in SHADES:
            begin, end = window.start / 1e6, window.end / 1e6
            axes.axvspan(begin, end, color=SHADES[window.name], linewidth=0, zorder=0)
            axes.text(
                (begin + end) / 2,
                1.01,
                window.name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
                color="0.35",
            )
    axes.set_xlabel("tokens (millions)")
    axes.grid(alpha=0.3)
    axes.margins(x=0.01)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
