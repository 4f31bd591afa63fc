"""Writes what a comparison found: report.md to read, report.json for programs."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.compared_models import ModelFacts
from train.comparison import Arm, Comparison, Pair, percent
from train.finished import HASHES, FinishedRun
from train.gaps import BLOCKS, EARLY, LAST, Estimate
from train.guards import write_atomically

MOST = 8
"""Modules listed of those that lose most values."""


def write_report(comparison: Comparison, folder: Path, plots: Sequence[Path]) -> None:
    """Write report.md and report.json.

    Args:
        plots: pictures to show, below `folder`.
    """
    data = json.dumps(as_dict(comparison), indent=1, allow_nan=False)
    write_atomically(folder / "report.json", data + "\n")
    write_atomically(folder / "report.md", markdown(comparison, folder, plots))


def headline(arm: Arm, budget: float) -> str:
    """The verdict in one line."""
    verdict = arm.verdict
    word = "PASS" if verdict.passed else "FAIL"
    gap = "unknown" if verdict.gap is None else _estimate(verdict.gap)
    paired = "" if all(not pair.unpaired for pair in arm.pairs) else "; not paired"
    return (
        f"{arm.name}: {word}: mean relative gap of the {verdict.measure} in the {LAST} {gap}, "
        f"budget {percent(budget, '')}{paired}"
    )


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """All numbers, as JSON has them; what is unknown is null."""
    return {
        "passed": comparison.passed,
        "budget": comparison.budget,
        "baseline": {
            "name": comparison.base_name,
            "runs": [_run(run) for run in comparison.base],
            "spread_between_seeds": comparison.noise,
            "flushed_to_zero": comparison.flushed(comparison.base_name),
        },
        "models": {name: asdict(facts) for name, facts in comparison.models.items()},
        "windows": {w.name: {"from_token": w.start, "to_token": w.end} for w in comparison.windows},
        "arms": {
            arm.name: _arm(arm) | {"flushed_to_zero": comparison.flushed(arm.name)}
            for arm in comparison.arms
        },
    }


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "verdict": asdict(arm.verdict),
        "pairs": [
            {
                "arm": _run(pair.arm),
                "baseline": _run(pair.base),
                "paired": not pair.unpaired,
                "why_not": pair.unpaired,
            }
            for pair in arm.pairs
        ],
        "training_loss_gap": {name: _or_null(e) for name, e in arm.training.items()},
        "mtp_loss_gap": [{name: _or_null(e) for name, e in d.items()} for d in arm.mtp],
        "held_out_loss_gap": {name: _or_null(e) for name, e in arm.held_out.items()},
        "cost": asdict(arm.cost),
    }


def _run(run: FinishedRun) -> dict[str, Any]:
    return {
        "directory": str(run.folder),
        "precision": run.precision,
        "seed": run.seed,
        "steps": len(run.records),
        "tokens": run.records[-1]["tokens"] if run.records else 0,
        "identity": run.identity,
        "formats": formats(run),
    }


def formats(run: FinishedRun) -> dict[str, int] | None:
    """Format -> modules that ran in it, at the end of the run; None: not known."""
    if not run.applied:
        return None
    modules = run.applied[-1]["modules"].values()
    return dict(sorted(Counter(str(module["ran"]) for module in modules).items()))


def markdown(comparison: Comparison, folder: Path, plots: Sequence[Path]) -> str:
    """The report to read."""
    names = ", ".join(arm.name for arm in comparison.arms)
    parts = [f"# {names} against {comparison.base_name}"]
    for arm in comparison.arms:
        parts.append(f"**{headline(arm, comparison.budget)}.**")
        verdict = arm.verdict
        reasons = [f"- fails: {text}." for text in verdict.failures]
        reasons += [f"- note: {text}." for text in verdict.notes]
        if reasons:
            parts.append("\n".join(reasons))
    parts += [
        *_models(comparison.models),
        "## Loss gap by window",
        _windows(comparison),
        "## Held-out loss",
        _held_out(comparison),
        "## Cost and gradients",
        _costs(comparison),
        *_flushed(comparison),
        "## What differs between the runs",
        _pairs(comparison),
        "## Plots",
        *(f"![{path.stem}]({path.relative_to(folder).as_posix()})" for path in plots),
        "## How to read it",
        _legend(comparison),
    ]
    return "\n\n".join(parts) + "\n"


def _models(models: dict[str, ModelFacts]) -> list[str]:
    """What the arms are, if they are different models: the baseline in the first column."""
    if not models:
        return []
    facts = list(models.values())

    def row(what: str, values: Sequence[float], digits: int = 0) -> list[str]:
        shown = [f"{values[0]:,.{digits}f}"]
        for value in values[1:]:
            change = f" ({percent(value / values[0] - 1)})" if values[0] else ""
            shown.append(f"{value:,.{digits}f}{change}")
        return [what, *shown]

    rows = [
        ["", *models],
        row("parameters", [f.parameters for f in facts]),
        row("active parameters of a token", [f.active for f in facts]),
        row("training MFLOP of a token", [f.training_flops / 1e6 for f in facts], 3),
        row("all-to-all bytes of a token and MoE layer", [f.dispatched_bytes for f in facts]),
    ]
    rows += [[f"`{key}`", *(str(f.settings[key]) for f in facts)] for key in facts[0].settings]
    return [
        "## The models",
        _table(rows),
        "Active parameters include embedding and head, without multi-token prediction. The bytes "
        "are those to the experts and back in the forward pass if all of them are on other ranks.",
    ]


def _windows(comparison: Comparison) -> str:
    names = [w.name for w in comparison.windows]
    rows = [["", *names]]
    for arm in comparison.arms:
        rows.append([arm.name, *(_estimate(arm.training[n]) for n in names)])
        for depth, gaps in enumerate(arm.mtp, start=1):
            rows.append([f"{arm.name}, MTP depth {depth}", *(_estimate(gaps[n]) for n in names)])
    floor = [_share(comparison.noise[n]) for n in names]
    rows.append([f"{comparison.base_name} between seeds", *floor])
    return _table(rows)


def _held_out(comparison: Comparison) -> str:
    rows = [["", LAST, "end of the run", "pairs, end of the run"]]
    for arm in comparison.arms:
        end = arm.held_out["end"]
        between = "-" if end is None else f"{percent(end.low)} to {percent(end.high)}"
        rows.append([arm.name, _estimate(arm.held_out[LAST]), _estimate(end), between])
    floor = _share(comparison.noise["held-out"])
    rows.append([f"{comparison.base_name} between seeds", "-", floor, "-"])
    return _table(rows)


def _costs(comparison: Comparison) -> str:
    rows = [
        ["", "time per step", "tokens/s", "gradient norm", "zero gradient elements"],
    ]
    first = comparison.arms[0].cost
    base = [comparison.base_name, "1", _number(first.base_tokens_per_second), "1"]
    rows.append([*base, _share(first.base_zero_grad_share)])
    for arm in comparison.arms:
        cost = arm.cost
        rows.append(
            [
                arm.name,
                f"x {_number(cost.seconds_ratio)}",
                _number(cost.tokens_per_second),
                f"x {_number(cost.grad_norm_ratio)}",
                _share(cost.zero_grad_share),
            ]
        )
    return _table(rows)


def _flushed(comparison: Comparison) -> list[str]:
    rows = [["", "module", "tensor", "non-zero values flushed to zero"]]
    for name in comparison.runs:
        values = [
            (share, module, tensor)
            for tensor, modules in comparison.flushed(name).items()
            for module, share in modules.items()
        ]
        for share, module, tensor in sorted(values, reverse=True)[:MOST]:
            rows.append([name, module, tensor, percent(share, "")])
    if len(rows) == 1:
        return []
    return [
        "## Values flushed to zero",
        f"The {MOST} operands that lose most, of the baseline and of each arm.",
        _table(rows),
    ]


def _pairs(comparison: Comparison) -> str:
    rows = [["run", "seed", *HASHES.values(), "modules that ran in", "paired with the baseline"]]
    rows += [[*_proof(run), "it is the baseline"] for run in comparison.base]
    rows += [[*_proof(p.arm), _paired(p)] for arm in comparison.arms for p in arm.pairs]
    return _table(rows)


def _proof(run: FinishedRun) -> list[str]:
    hashes = [(run.identity or {}).get(key, "not known")[:12] for key in HASHES]
    counts = formats(run)
    ran = "not known" if counts is None else ", ".join(f"{f}: {n}" for f, n in counts.items())
    return [str(run.folder), str(run.seed), *hashes, ran]


def _paired(pair: Pair) -> str:
    why = pair.unpaired
    return f"{'no' if why else 'yes'}: {pair.base.folder}"


def _legend(comparison: Comparison) -> str:
    tokens = ", ".join(f"{w.name} {w.start:,.0f} to {w.end:,.0f}" for w in comparison.windows)
    return "\n".join(
        [
            "- Gap: (loss of the arm - loss of the baseline) / loss of the baseline, of the same "
            "step; positive is worse. Mean over the steps of a window and over pairs.",
            f"- Windows in tokens: {tokens}. Early is the warmup or {percent(EARLY, '')} of the "
            "run, decay that of the learning rate.",
            f"- +- is one standard error: the larger of that of the means of {BLOCKS} blocks of "
            "steps (neighbours are alike) and that between pairs.",
            "- Between seeds: standard deviation of the baseline's loss between its seeds, "
            "relative to their mean. A gap below it is less than the choice of a seed.",
            _paired_means(comparison),
            "- Verdict: fails if the mean gap in the last quarter is not below the budget, if a "
            "module ran in another format than its recipe's or nothing shows that it did not, if "
            "an arm has the losses of a run in other formats, if an arm of another precision or "
            "model is not paired, or if a loss or gradient was not finite. A negative gap alone "
            "never fails.",
        ]
    )


def _paired_means(comparison: Comparison) -> str:
    shown = "The first 12 digits are shown, all are in report.json."
    if comparison.models:
        return (
            "- Paired: the same hash of data order, and the same value of every key outside the "
            "model, seed included. Other models have other initial weights: those of each are "
            f"drawn anew, and a part of one gap is that draw. {shown}"
        )
    return (
        "- Paired: the same hash of initial weights, of data order and of every key outside "
        f"precision. {shown}"
    )


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    error = "" if estimate.error is None else f" +- {percent(estimate.error, '', 2)}"
    return f"{percent(estimate.mean)}{error}"


def _share(share: float | None) -> str:
    return "-" if share is None else percent(share, "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _or_null(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
