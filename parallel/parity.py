"""`python -m parallel.parity`: the same training under every layout.

Each layout is one `python -m train` from one seed, in processes of its own; what it wrote into
metrics.jsonl is compared with what one rank wrote. layouts.md says what the table means.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.compose import refuse_stages, run_cli
from recipes.errors import ConfigError, StrataError
from recipes.rules import one_of, show
from recipes.schema import PrecisionConfig, Recipe
from recipes.tables import table

EXIT_FAILED = 1
"""A layout trains something else."""

FIRST, LAST = 1e-5, 1e-3
"""Relative difference a layout may have at the first and at the last step: rounding of FP32
sums; and what it has grown to when routers near a tie have sent tokens elsewhere."""

QUANTISED_FIRST, QUANTISED_LAST = 1e-2, 5e-2
"""The same where the layout changes which numbers share a scale, or a draw."""


@dataclass(frozen=True)
class Case:
    """One layout; sizes are of the keys parallel.*_parallel_size."""

    name: str
    tensor_model: int = 1
    pipeline_model: int = 1
    context: int = 1
    expert_model: int = 1
    expert_tensor: int = 1
    data: int = 1
    virtual: int = 1
    """Stages of a pipeline rank."""
    same_operands: bool = False
    """Every matrix product has the operands it has on one rank, so that rounding them to nearest
    gives the same numbers: the layout moves whole layers or whole micro batches."""
    overrides: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes it needs."""
        return self.tensor_model * self.pipeline_model * self.context * self.data

    def arguments(self, pattern: str) -> list[str]:
        """Overrides of `python -m train` for a model with this pattern."""
        names = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")
        sizes = [f"parallel.{n}_parallel_size={getattr(self, n)}" for n in (*names, "data")]
        stages = self.pipeline_model * self.virtual
        return [*sizes, f"model.hybrid_layer_pattern='{cut(pattern, stages)}'", *self.overrides]


REFERENCE = Case("1")
MATRIX = (
    Case("1, micro batches of 2", overrides=("stage.micro_batch_size=2",)),
    Case("dp2", data=2, same_operands=True),
    Case("tp2", tensor_model=2),
    Case("pp2", pipeline_model=2, same_operands=True),
    Case("pp2 vp2", pipeline_model=2, virtual=2, same_operands=True),
    Case("cp2", context=2),
    Case("ep2", data=2, expert_model=2),
    Case("etp2", tensor_model=2, expert_tensor=2),
    Case("tp2 ep2", tensor_model=2, data=2, expert_model=2),
    Case("ep2 cp2", context=2, data=2, expert_model=2),
    Case("tp2 cp2", tensor_model=2, context=2),
    Case("pp2 ep2", pipeline_model=2, data=2, expert_model=2),
)


@dataclass(frozen=True)
class Bounds:
    """Relative differences a layout may have."""

    losses: float = FIRST
    """At the first step: they are computed before any gradient."""
    grad_norm: float = FIRST
    """At the first step."""
    last: float = LAST
    """At the last step, of everything."""


def bounds(case: Case, precision: PrecisionConfig) -> Bounds:
    """What a layout may differ by: layouts.md says why, layout by layout."""
    formats = {rule.format for rule in (*precision.rules, *precision.extra_rules)}
    nvfp4 = any("nvfp4" in name for name in formats)
    quantised = nvfp4 or any("mxfp8" in name for name in formats)
    if precision.params_dtype == "fp32" and not quantised:
        return Bounds()
    losses = FIRST if case.same_operands else QUANTISED_FIRST
    # Each rank rounds its gradients with draws of its own.
    drawn = nvfp4 and not precision.disable_stochastic_rounding
    return Bounds(losses, QUANTISED_FIRST if drawn else losses, QUANTISED_LAST)


@dataclass
class Outcome:
    """What came of one layout."""

    layout: str
    ranks: int
    verdict: str
    """equal, different, failed or not available."""
    reason: str = ""
    """Of a layout that did not train."""
    first: dict[str, float] = field(default_factory=dict)
    """Relative difference from one rank at the first step: loss, grad_norm, mtp_loss."""
    last: dict[str, float] = field(default_factory=dict)
    """The same at the last step."""


def main(recipe: Recipe) -> int:
    """Train every layout, compare it with one rank, write the table.

    Returns:
        0: every layout that is available is equal; 1: one is not, or none is available.

    Raises:
        ConfigError: an override says what the layouts decide, an unknown layout, or stages.
        StrataError: the single rank does not train.
    """
    arguments = sys.argv[1:]
    for argument in arguments:
        if any(argument.split("=")[0].startswith(f"{key}") for key in ("parallel", "stage.micro")):
            raise ConfigError(f"{argument}: the layouts decide this; leave it out")
    refuse_stages(recipe, "parallel.parity")
    chosen = _chosen(recipe.parity.layouts)
    common = [a for a in arguments if not a.startswith(("run.dir=", "parity."))]
    folder = Path(recipe.run.dir)
    shutil.rmtree(folder / "layouts", ignore_errors=True)
    pattern = recipe.model.hybrid_layer_pattern.replace("|", "")
    steps: list[list[dict[str, Any]]] = []
    outcomes = []
    for case in _shown((REFERENCE, *chosen), recipe.logging.progress):
        where = folder / "layouts" / case.name.replace(",", "").replace(" ", "_")
        overrides = [*common, *case.arguments(pattern), f"run.dir={where}"]
        code, said = _train(overrides, where)
        if case is REFERENCE:
            if code != 0:
                raise StrataError(f"one rank does not train: {said}")
            steps.append(_records(where))
        elif code == 2:
            outcomes.append(Outcome(case.name, case.ranks, "not available", said))
        elif code != 0:
            outcomes.append(Outcome(case.name, case.ranks, "failed", said))
        else:
            allowed = bounds(case, recipe.precision)
            outcomes.append(judge(case, _records(where), steps[0], allowed))
    print(report(outcomes))
    (folder / "parity.md").write_text(markdown(outcomes) + "\n")
    summary = {"layouts": [asdict(o) for o in outcomes], "reference": steps[0]}
    (folder / "parity.json").write_text(json.dumps(summary, indent=1) + "\n")
    return exit_code(outcomes)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 only if something was compared, and all of it is equal."""
    verdicts = {o.verdict for o in outcomes}
    return 0 if "equal" in verdicts and verdicts <= {"equal", "not available"} else EXIT_FAILED


def cut(pattern: str, stages: int) -> str:
    """The pattern with the decoder in so many stages of about equal length."""
    layers, *mtp = pattern.split("/")
    bounds = [len(layers) * i // stages for i in range(stages + 1)]
    pieces = [layers[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return "/".join(["|".join(pieces), *mtp])


def judge(
    case: Case, steps: Sequence[dict[str, Any]], one: Sequence[dict[str, Any]], allowed: Bounds
) -> Outcome:
    """Compare a layout's steps with those of one rank."""
    if len(steps) != len(one):
        reason = f"{len(steps)} steps, not {len(one)}"
        return Outcome(case.name, case.ranks, "failed", reason)
    first, last = differences(steps[0], one[0]), differences(steps[-1], one[-1])
    # NaN is not within a bound.
    equal = all(
        d <= (allowed.grad_norm if name == "grad_norm" else allowed.losses)
        for name, d in first.items()
    ) and all(d <= allowed.last for d in last.values())
    verdict = "equal" if equal else "different"
    return Outcome(case.name, case.ranks, verdict, first=first, last=last)


def differences(step: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """Relative differences of two lines of metrics.jsonl; of MTP's depths the largest."""
    pairs = [
        ("loss", step["loss"], one["loss"]),
        ("grad_norm", step["grad_norm"], one["grad_norm"]),
    ]
    pairs += [("mtp_loss", a, b) for a, b in zip(step["mtp_loss"], one["mtp_loss"], strict=True)]
    found: dict[str, float] = {}
    for name, value, wanted in pairs:
        # A number that is not finite is null there.
        missing = value is None or wanted is None
        difference = float("inf") if missing else abs(value - wanted) / abs(wanted)
        found[name] = max(difference, found.get(name, 0.0))
    return found


def report(outcomes: Sequence[Outcome]) -> str:
    """The table, a line a layout, and the reasons of those without numbers."""
    rows = _rows(outcomes)
    return "\n".join([table(rows, left=(0, len(rows[0]) - 1)), *_reasons(outcomes)])


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The same for a page."""
    head, *rows = (f"| {' | '.join(row)} |" for row in _rows(outcomes))
    line = "|---" * (head.count("|") - 1) + "|"
    return "\n".join([head, line, *rows, *(f"\n{reason}" for reason in _reasons(outcomes))])


def _rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    names = sorted({name for o in outcomes for name in o.first})
    head = ["layout", "ranks", *(f"{n}, {w}" for w in ("first", "last") for n in names), "verdict"]
    rows = [head]
    for o in outcomes:
        values = [d.get(n) for d in (o.first, o.last) for n in names]
        cells = ["-" if v is None else f"{v:.1e}" for v in values]
        rows.append([o.layout, str(o.ranks), *cells, o.verdict])
    return rows


def _reasons(outcomes: Sequence[Outcome]) -> list[str]:
    return [f"{o.layout}: {o.reason}" for o in outcomes if o.reason]


def _chosen(names: Sequence[str]) -> Sequence[Case]:
    known = {case.name: case for case in MATRIX}
    for name in names:
        one_of("parity.layouts", name, known)
    return [known[name] for name in names] or MATRIX


def _shown(cases: Sequence[Case], progress: bool) -> Iterator[Case]:
    """The cases, with a progress bar that says which one trains."""
    from tqdm import tqdm

    bar = tqdm(cases, unit="layout", disable=not progress, dynamic_ncols=True)
    for case in bar:
        bar.set_postfix_str(case.name)
        yield case


def _train(overrides: list[str], where: Path) -> tuple[int, str]:
    """Exit code of `python -m train`, and why it is not zero."""
    where.parent.mkdir(parents=True, exist_ok=True)
    log = where.parent / f"{where.name}.log"
    command = [sys.executable, "-m", "train", *overrides, "logging.progress=false"]
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if code == 2:
        return code, log.read_text().strip().splitlines()[-1]
    return code, f"exit code {show(code)}; see {log}" if code else ""


def _records(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    if not any(a.startswith("experiment=") for a in sys.argv):
        sys.argv.insert(1, "experiment=parity")
    run_cli(main, "parallel.parity", all_stages=True)
