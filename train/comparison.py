"""Compares finished runs: which arms there are, how far their losses are apart, the verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recipes.errors import ConfigError
from train import finished
from train.compared_models import ModelFacts, model_facts
from train.finished import FinishedRun
from train.gaps import (
    LAST,
    Estimate,
    Mask,
    Series,
    Window,
    estimate,
    finite_mean,
    relative_gap,
    spread,
    windows,
)
from train.heat_map import Shares, flushed

SIDES = ("model", "precision")
"""Sections of a recipe whose differences make an arm."""

TRAINING, HELD_OUT = "training loss", "held-out loss"
"""What a verdict can be about."""


@dataclass(frozen=True)
class Pair:
    """One run of an arm and the run of the baseline it is held against."""

    arm: FinishedRun
    base: FinishedRun

    @property
    def one_side(self) -> bool:
        """Whether both have one precision and model: something else is compared."""
        return all(self.arm.part(side) == self.base.part(side) for side in SIDES)

    @property
    def unpaired(self) -> list[str]:
        """Why they may differ in more than what is compared; empty: proved that they do not."""
        return finished.unpaired(self.arm, self.base)

    @property
    def same_data(self) -> bool:
        """Whether both read the same text in the same order."""
        return finished.same_data(self.arm, self.base)

    def gap(self, key: str, depth: int | None = None) -> Series:
        """[n], relative gap of one metric at each step."""
        return relative_gap(self.arm.series(key, depth), self.base.series(key, depth))


@dataclass(frozen=True)
class Cost:
    """What an arm took beside the baseline, over all pairs."""

    seconds_ratio: float | None
    """Time per step: median of the arm / median of the baseline, mean over pairs."""
    tokens_per_second: float | None
    """Of the arm: median over steps, mean over pairs."""
    base_tokens_per_second: float | None
    """Of the baseline."""
    grad_norm_ratio: float | None
    """Geometric mean of arm / baseline in the last quarter."""
    zero_grad_share: float | None
    """Share of gradient elements that are exactly zero, last quarter."""
    base_zero_grad_share: float | None
    """Of the baseline."""


@dataclass(frozen=True)
class Verdict:
    """Pass or fail, and why."""

    passed: bool
    measure: str
    """TRAINING or HELD_OUT."""
    gap: Estimate | None
    """Relative gap of that measure in the last quarter."""
    failures: list[str]
    """Each is enough to fail."""
    notes: list[str]
    """What to bear in mind."""


@dataclass(frozen=True)
class Arm:
    """One thing that is compared with the baseline, and what came out."""

    name: str
    pairs: list[Pair]
    training: dict[str, Estimate | None]
    """Window -> relative gap of the training loss."""
    mtp: list[dict[str, Estimate | None]]
    """The same for the loss of each MTP depth."""
    held_out: dict[str, Estimate | None]
    """Relative gap of the held-out loss: `last quarter` and `end`."""
    cost: Cost
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Everything a report says."""

    base_name: str
    base: list[FinishedRun]
    windows: list[Window]
    noise: dict[str, float | None]
    """Window, or `held-out` for the end -> standard deviation between the seeds of the baseline,
    relative to their mean loss; None: one seed."""
    budget: float
    arms: list[Arm]
    models: dict[str, ModelFacts]
    """Baseline and arms -> what their models cost; empty if all runs have one model."""

    @property
    def passed(self) -> bool:
        """Whether every arm passes."""
        return all(arm.verdict.passed for arm in self.arms)

    @property
    def runs(self) -> dict[str, list[FinishedRun]]:
        """Baseline, then arms -> their runs."""
        arms = {arm.name: [pair.arm for pair in arm.pairs] for arm in self.arms}
        return {self.base_name: self.base} | arms

    def flushed(self, name: str) -> Shares:
        """What was flushed to zero in the baseline or an arm, mean over its runs."""
        return flushed(line for run in self.runs[name] for line in run.telemetry)


def compare(runs: Sequence[FinishedRun], budget: float) -> Comparison:
    """Compare runs; the first, and those that differ from it in the seed alone, are the baseline.

    Runs that differ in nothing but the seed are one arm. If all are such, each run but the first
    is an arm, so that seeds can be compared.

    Args:
        budget: relative loss gap that still passes.

    Raises:
        ConfigError: fewer than two runs, the same run twice, or runs of different length.
    """
    folders = [run.folder.resolve() for run in runs]
    if len(runs) < 2 or len(set(folders)) < len(folders):
        raise ConfigError(
            f"compare.runs={[str(r.folder) for r in runs]} must name two or more different "
            "directories; the first is the baseline"
        )
    finished.same_length(runs)
    base_name, base, others = _groups(runs)
    parts = windows(base[0].optimizer, base[0].stage)
    masks = {w.name: w.mask(base[0].stage) for w in parts}
    if LAST not in masks:
        raise ConfigError(
            f"{base[0].folder} is too short to judge its last quarter; train at least 4 steps"
        )
    noise = _noise(base, masks)
    arms = [
        _arm(name, _pairs(group, base), runs, masks, noise, budget)
        for name, group in others.items()
    ]
    models = model_facts({base_name: base[0]} | {name: g[0] for name, g in others.items()})
    return Comparison(base_name, base, parts, noise, budget, arms, models)


def _groups(
    runs: Sequence[FinishedRun],
) -> tuple[str, list[FinishedRun], dict[str, list[FinishedRun]]]:
    """The baseline's name and runs, and name -> runs of each arm."""
    groups: list[list[FinishedRun]] = []
    for run in runs:
        group = next((g for g in groups if finished.seeds_of_one(g[0], run)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    if len(groups) == 1:
        groups = [[run] for run in runs]
    first = groups[0][0]
    sides = [s for s in SIDES if any(g[0].part(s) != first.part(s) for g in groups)]
    names = [
        ", ".join(str(group[0].config[side]["name"]) for side in sides or ["precision"])
        for group in groups
    ]
    arms = {
        # Recipes of one name that are not the same, or runs of one, are told apart by directory.
        name if names.count(name) == 1 else f"{name} in {group[0].folder}": group
        for name, group in zip(names[1:], groups[1:], strict=True)
    }
    return names[0], groups[0], arms


def _pairs(group: Sequence[FinishedRun], base: Sequence[FinishedRun]) -> list[Pair]:
    """Each run with the baseline of its seed, or else with another one."""
    by_seed = {run.seed: run for run in reversed(base)}
    return [Pair(run, by_seed.get(run.seed, base[i % len(base)])) for i, run in enumerate(group)]


def _noise(base: Sequence[FinishedRun], masks: dict[str, Mask]) -> dict[str, float | None]:
    noise = {
        name: spread(np.array([finite_mean(run.series("loss")[mask]) or np.nan for run in base]))
        for name, mask in masks.items()
    }
    ends = [run.series("validation_loss")[-1] for run in base]
    return noise | {"held-out": spread(np.array(ends))}


def _arm(
    name: str,
    pairs: list[Pair],
    runs: Sequence[FinishedRun],
    masks: dict[str, Mask],
    noise: dict[str, float | None],
    budget: float,
) -> Arm:
    def over(key: str, depth: int | None = None) -> dict[str, Estimate | None]:
        gaps = np.stack([pair.gap(key, depth) for pair in pairs])
        return {window: estimate(gaps[:, mask]) for window, mask in masks.items()}

    checked = np.stack([pair.gap("validation_loss") for pair in pairs])
    training = over("loss")
    held_out = {LAST: estimate(checked[:, masks[LAST]]), "end": estimate(checked[:, -1:])}
    return Arm(
        name=name,
        pairs=pairs,
        training=training,
        mtp=[over("mtp_loss", depth) for depth in range(pairs[0].base.mtp_depths)],
        held_out=held_out,
        cost=_cost(pairs, masks[LAST]),
        verdict=_verdict(pairs, runs, training[LAST], held_out[LAST], noise, budget),
    )


def _cost(pairs: Sequence[Pair], last: Mask) -> Cost:
    def mean(values: Sequence[float]) -> float | None:
        return finite_mean(np.array(values))

    def median(run: FinishedRun, key: str) -> float:
        return float(np.median([r[key] for r in run.records] or [np.nan]))

    with np.errstate(divide="ignore", invalid="ignore"):  # a norm of zero has no logarithm
        logs = [np.log(p.arm.series("grad_norm") / p.base.series("grad_norm")) for p in pairs]
    norm = finite_mean(np.stack(logs)[:, last])
    return Cost(
        seconds_ratio=mean([median(p.arm, "seconds") / median(p.base, "seconds") for p in pairs]),
        tokens_per_second=mean([median(p.arm, "tokens_per_second") for p in pairs]),
        base_tokens_per_second=mean([median(p.base, "tokens_per_second") for p in pairs]),
        grad_norm_ratio=None if norm is None else math.exp(norm),
        zero_grad_share=finite_mean(
            np.stack([p.arm.series("zero_grad_share") for p in pairs])[:, last]
        ),
        base_zero_grad_share=finite_mean(
            np.stack([p.base.series("zero_grad_share") for p in pairs])[:, last]
        ),
    )


def _verdict(
    pairs: Sequence[Pair],
    runs: Sequence[FinishedRun],
    training: Estimate | None,
    held_out: Estimate | None,
    noise: dict[str, float | None],
    budget: float,
) -> Verdict:
    # Losses of different text differ by what the text is; the held-out text is always the same.
    alike = all(pair.same_data for pair in pairs)
    measure = TRAINING if alike or held_out is None else HELD_OUT
    gap = training if measure == TRAINING else held_out
    tolerance = 0.0 if alike else _seed_tolerance(pairs, [training, held_out])
    failures = [reason for pair in pairs for reason in _failures(pair, runs)]
    if gap is None:
        failures.append(f"there is no {measure} in the {LAST} of the run")
    elif gap.mean - tolerance >= budget:
        failures.append(
            f"the mean relative gap of the {measure} in the {LAST} is {percent(gap.mean)}, not "
            f"below the budget of {percent(budget, '')}"
        )
    notes = _notes(pairs, gap, budget)
    if gap is not None and budget <= gap.mean < budget + tolerance:
        notes.append(
            f"passes though the gap is above the budget: the arm has the precision of the "
            f"baseline, and a gap up to {percent(budget + tolerance, '')} is within two standard "
            "errors of losses of different text"
        )
    floor = noise[LAST] if measure == TRAINING else noise["held-out"]
    if floor is not None and floor > budget:
        notes.append(
            f"the baseline alone differs by {percent(floor, '')} between seeds, more than the "
            "budget: only pairs of equal seed say something at this length"
        )
    if not alike:
        notes.append(f"the text they trained on differs, so the verdict is about the {measure}")
    return Verdict(not failures, measure, gap, list(dict.fromkeys(failures)), notes)


def _seed_tolerance(pairs: Sequence[Pair], gaps: Sequence[Estimate | None]) -> float:
    """Two standard errors, if arm and baseline have one precision and model; 0 for another.

    Runs of one precision have no format to accept or refuse: they fail if they are surely apart.
    An arm of another precision or model is not helped by a noisy comparison.
    """
    if not all(pair.one_side for pair in pairs):
        return 0.0
    return 2 * max((g.error for g in gaps if g is not None and g.error is not None), default=0.0)


def _failures(pair: Pair, runs: Sequence[FinishedRun]) -> list[str]:
    """What fails a pair whatever its gap is.

    Args:
        runs: all that are compared.
    """
    failures = finished.format_failures(pair.base) + finished.format_failures(pair.arm)
    for run in (pair.base, pair.arm):
        if bad := [str(step) for step in run.bad_steps()]:
            failures.append(
                f"{run.folder}: loss or gradient was not finite at step {finished.shortened(bad)}"
            )
    for other in runs:
        if finished.must_differ(pair.arm, other) and finished.same_losses(pair.arm, other):
            claims = [r.precision for r in (pair.arm, other) if r.claims_quantized()]
            failures.append(
                f"{pair.arm.folder} has exactly the losses of {other.folder} in every step: "
                f"precision={' or '.join(claims)} was ignored"
            )
    if not pair.one_side and (why := pair.unpaired):
        failures.append(f"{_not_paired(pair, why)}; the gap may be of that: train both alike")
    return failures


def _not_paired(pair: Pair, why: Sequence[str]) -> str:
    return f"not paired ({pair.arm.folder}, {pair.base.folder}): {'; '.join(why)}"


def _notes(pairs: Sequence[Pair], gap: Estimate | None, budget: float) -> list[str]:
    """What a reader must know to weigh the verdict."""
    notes = []
    for pair in pairs:
        if pair.one_side and (why := pair.unpaired):
            notes.append(_not_paired(pair, why))
    if gap is None:
        return notes
    if gap.error is None:
        notes.append("too few steps or seeds to say how uncertain the gap is")
    elif abs(gap.mean - budget) <= 2 * gap.error:
        notes.append(
            f"within noise of the budget: the gap is {percent(gap.mean)} with a standard error of "
            f"{percent(gap.error, '', 2)}"
        )
    if gap.pairs == 1:
        notes.append("one pair of runs: another seed may give another gap")
    return notes


def percent(share: float, sign: str = "+", digits: int = 3) -> str:
    """0.0123 -> `+1.23 %`."""
    return f"{100 * share:{sign}.{digits}g} %"
