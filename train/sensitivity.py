"""Measures for precision/sensitivity.py: held-out losses of a trained model whose modules are
quantised one at a time, from a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precision.sensitivity import (
    Effect,
    candidates,
    protecting,
    published,
    ranked,
    recipe_of,
    within_budget,
    within_flops,
)
from recipes.errors import CheckpointError, ConfigError
from recipes.schema import Recipe
from recipes.tables import table
from train import rundir
from train.guards import EXIT_COMPLETE, write_atomically
from train.run import in_world, log_file

if TYPE_CHECKING:
    from model.backends import Backends
    from parallel.layout import Layout
    from precision.policy import Decision, Policy

RECIPE = "measured"
"""Name of the precision recipe that is written."""

CURVE_POINTS = 8
"""Measured points of the picture between nothing and everything protected."""

SHOWN = 20
"""Modules in the table of the report; report.json has all."""


@dataclass(frozen=True)
class Point:
    """A measured policy."""

    protected: list[Effect]
    share: float
    """Of the FLOPs the recipe quantises, those that are protected."""
    gap: float
    """(loss - loss without quantisation) / loss without quantisation, on the judging batches."""


@dataclass(frozen=True)
class Findings:
    """All that was measured."""

    step: int
    """Of the checkpoint."""
    loss: float
    """Held-out loss without quantisation, on the judging batches, in nats a token."""
    measured_loss: float
    """The same on the batches that measure modules."""
    effects: list[Effect]
    """Best to protect first."""
    chosen: Point
    """The fewest FLOPs within the budget."""
    last_layers: Point
    """The published rule."""
    as_costly: Point
    """Our order, at the published rule's FLOPs."""
    curve: list[Point]


def run(recipe: Recipe) -> int:
    """Measure the run in run.dir and write what was found into run.dir/sensitivity.

    Raises:
        CheckpointError: there is no checkpoint, or it does not fit.
        ConfigError: the recipe quantises nothing, is of another model, or has no held-out text.
    """
    batches = 2 * recipe.sensitivity.batches
    return in_world(replace(recipe, stage=replace(recipe.stage, eval_steps=batches)), _measure)


def _measure(
    recipe: Recipe, layout: "Layout", backends: "Backends", messages: MemoryHandler
) -> int:
    import torch.distributed as dist

    from data.ranks import on_first_rank
    from model.gemms import policy_of
    from train.batches import Batches, check_data
    from train.build import build_state
    from train.checkpoint import Checkpointer

    folder, first = Path(recipe.run.dir), dist.get_rank() == 0
    policy = policy_of(recipe)
    if not candidates(policy):
        raise ConfigError(
            f"precision={recipe.precision.name} quantises no module of the decoder, so there is "
            "nothing to measure; use precision=nvfp4 or another recipe that does"
        )
    if not (folder / "checkpoints" / "latest").exists():
        raise CheckpointError(
            f"run.dir={folder} has no checkpoint; train it first, in any precision"
        )
    rundir.check_model(recipe)
    if first:
        print(backends, flush=True)
    on_first_rank(lambda: check_data(recipe))
    with rundir.usable(folder):
        messages.setTarget(log_file(folder, dist.get_rank()))
        messages.flush()
    data = Batches(recipe, layout.dp)
    if not data.has_validation:
        raise ConfigError("data.validation=[] leaves no held-out text to measure on; give a blend")
    state, _ = build_state(recipe, layout)
    only_loads = replace(recipe.checkpoint, async_save=False)
    loaded = Checkpointer(
        folder / "checkpoints", only_loads, data.fingerprint, lambda text: None
    ).load(state)
    assert loaded, "there is a checkpoint"
    probe = Probe(recipe, layout, policy, state.chunks, data)
    found = find(probe, state.progress.step, progress=first and recipe.logging.progress)
    if first:
        with rundir.usable(folder):
            print(write(recipe, found, folder / "sensitivity"))
    return EXIT_COMPLETE


class Probe:
    """Held-out losses of the loaded model in any formats. Collective: all ranks ask alike.

    Args:
        policy: the formats of the quantised modules.
        chunks: this rank's model chunks.
        data: the first `sensitivity.batches` held-out global batches measure modules, as many
            after them judge policies.
    """

    def __init__(
        self, recipe: Recipe, layout: "Layout", policy: "Policy", chunks: Sequence[Any], data: Any
    ) -> None:
        self.recipe, self.policy, self.chunks = recipe, policy, list(chunks)
        stage = recipe.stage
        self._microbatches = stage.global_batch_size // (stage.micro_batch_size * layout.dp)
        count = recipe.sensitivity.batches * self._microbatches
        kept = iter(data.validation())
        self._batches = {name: list(islice(kept, count)) for name in ("measure", "judge")}
        self._known: dict[tuple[str, tuple[Decision, ...]], float] = {}
        for chunk in self.chunks:
            chunk.eval()

    def loss(self, decisions: tuple["Decision", ...], batches: str) -> float:
        """Mean loss in nats a token with these formats on `measure` or `judge` batches.

        Raises:
            PrecisionError: a module ran in another format.
        """
        key = (batches, decisions)
        if key not in self._known:
            self._known[key] = self._run(decisions, self._batches[batches])
        return self._known[key]

    def _run(self, decisions: tuple["Decision", ...], batches: list[Any]) -> float:
        import torch

        from precision.apply import applied_formats, apply_policy, check_applied
        from train.step import reduce_losses, run_schedule

        # Measured in the formats of training: validation's own would stand in for them here.
        policy = replace(self.policy, start=decisions, after=decisions, evaluation=None)
        apply_policy(self.chunks, policy)
        iterators, reports = [iter(batches) for _ in self.chunks], []
        count, stage = self._microbatches, self.recipe.stage
        with torch.no_grad():
            for _ in range(self.recipe.sensitivity.batches):
                reports += run_schedule(self.chunks, iterators, count, stage, forward_only=True)
        check_applied(applied_formats(self.chunks, policy))
        return reduce_losses(reports, None, 0, 1).loss


def find(probe: Probe, step: int, progress: bool) -> Findings:
    """Measure every module, choose what to protect, judge it on other batches."""
    from tqdm import tqdm

    recipe, policy = probe.recipe, probe.policy
    modules = candidates(policy)
    names = [d.gemm.name for d in modules]
    plain, full = protecting(policy, names), protecting(policy, [])
    effects = []
    for decision in tqdm(modules, "modules", disable=not progress, unit="module"):
        name = decision.gemm.name
        if recipe.sensitivity.measure == "alone":
            others = [n for n in names if n != name]
            cost = probe.loss(protecting(policy, others), "measure") - probe.loss(plain, "measure")
        else:
            cost = probe.loss(full, "measure") - probe.loss(protecting(policy, [name]), "measure")
        effects.append(Effect(decision, cost))
    order = ranked(effects)
    base = probe.loss(plain, "judge")
    everything = sum(e.flops for e in order)

    def gap(protected: Sequence[Effect]) -> float:
        decisions = protecting(policy, [e.name for e in protected])
        return (probe.loss(decisions, "judge") - base) / base

    def point(protected: list[Effect]) -> Point:
        return Point(protected, sum(e.flops for e in protected) / everything, gap(protected))

    last = published(order, _num_layers(recipe))
    beginnings = [
        within_flops(order, i / CURVE_POINTS * everything) for i in range(CURVE_POINTS + 1)
    ]
    return Findings(
        step=step,
        loss=base,
        measured_loss=probe.loss(plain, "measure"),
        effects=order,
        chosen=point(within_budget(order, gap, recipe.sensitivity.budget)),
        last_layers=point(last),
        as_costly=point(within_flops(order, sum(e.flops for e in last))),
        curve=[point(b) for b in tqdm(beginnings, "policies", disable=not progress)],
    )


def _num_layers(recipe: Recipe) -> int:
    from model.pattern import parse_pattern

    return parse_pattern(recipe.model.hybrid_layer_pattern).num_layers


def write(recipe: Recipe, found: Findings, folder: Path) -> str:
    """Write report.md, report.json, tradeoff.png and the recipe; returns the summary."""
    settings = recipe.sensitivity
    (folder / "precision").mkdir(parents=True, exist_ok=True)
    why = f"protected by measurement: budget {settings.budget:g}, step {found.step}"
    text = recipe_of(recipe.precision, found.chosen.protected, RECIPE, why)
    write_atomically(folder / "precision" / f"{RECIPE}.yaml", text)
    _plot(recipe, found, folder / "tradeoff.png")
    write_atomically(folder / "report.json", json.dumps(_numbers(recipe, found), indent=1) + "\n")
    summary = _summary(recipe, found, folder)
    write_atomically(folder / "report.md", _markdown(found, summary))
    return f"{summary}\n\nreport: {folder}/report.md"


def _points(found: Findings) -> dict[str, Point]:
    return {
        "everything quantised": found.curve[0],
        "last 15 % of the layers": found.last_layers,
        "as many FLOPs, by measurement": found.as_costly,
        "fewest FLOPs within the budget": found.chosen,
    }


def _summary(recipe: Recipe, found: Findings, folder: Path) -> str:
    rows = [("protected", "modules", "FLOPs", "loss gap")]
    rows += [
        (name, str(len(p.protected)), f"{p.share:.1%}", f"{p.gap:+.3%}")
        for name, p in _points(found).items()
    ]
    return (
        f"{recipe.model.name}, step {found.step}, {recipe.precision.name}: held-out loss "
        f"{found.loss:.4f} without quantisation; budget {recipe.sensitivity.budget:.3%}\n\n"
        f"{table(rows, left=(0,))}\n\n"
        "FLOPs are a share of those that the recipe quantises in the decoder.\n"
        f"The last row is a recipe: --config-dir {folder} precision={RECIPE}"
    )


def _markdown(found: Findings, summary: str) -> str:
    rows = [("module", "format", "loss, nats", "share of FLOPs")]
    everything = sum(e.flops for e in found.effects)
    rows += [
        (e.name, e.decision.format, f"{e.loss:+.2e}", f"{e.flops / everything:.2%}")
        for e in found.effects[:SHOWN]
    ]
    more = len(found.effects) - SHOWN
    rest = f"\n{more} more are in report.json." if more > 0 else ""
    return (
        f"# Sensitivity to quantisation\n\n```\n{summary}\n```\n\n![](tradeoff.png)\n\n"
        "## Modules, best to protect first\n\n"
        f"```\n{table(rows, left=(0, 1))}\n```\n{rest}"
    )


def _numbers(recipe: Recipe, found: Findings) -> dict[str, Any]:
    points = {
        name: {"protected": [e.name for e in p.protected], "flops": p.share, "gap": p.gap}
        for name, p in _points(found).items()
    }
    return {
        "model": recipe.model.name,
        "precision": recipe.precision.name,
        "step": found.step,
        "budget": recipe.sensitivity.budget,
        "measure": recipe.sensitivity.measure,
        "batches": recipe.sensitivity.batches,
        "loss": found.loss,
        "measured_loss": found.measured_loss,
        "policies": points,
        "curve": [{"flops": p.share, "gap": p.gap} for p in found.curve],
        "modules": [
            {"module": e.name, "format": e.decision.format, "loss": e.loss, "flops": e.flops}
            for e in found.effects
        ],
    }


def _plot(recipe: Recipe, found: Findings, path: Path) -> None:
    """Loss gap over protected FLOPs: our order, the published rule, the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot(
        [100 * p.share for p in found.curve],
        [100 * p.gap for p in found.curve],
        "o-",
        label="by measurement",
    )
    for name, marker in (("last 15 % of the layers", "s"), ("fewest FLOPs within the budget", "*")):
        p = _points(found)[name]
        axes.plot(100 * p.share, 100 * p.gap, marker, markersize=10, label=name)
    budget = 100 * recipe.sensitivity.budget
    axes.axhline(budget, color="0.4", linestyle="--", linewidth=0.8, label=f"budget {budget:g} %")
    axes.set_xlabel("protected share of the quantised FLOPs (%)")
    axes.set_ylabel("held-out loss over no quantisation (%)")
    axes.set_title(f"{recipe.model.name}, {recipe.precision.name}, step {found.step}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
