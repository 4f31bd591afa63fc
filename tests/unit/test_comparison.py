"""The analysis of a comparison, on run directories made up with gaps that are known."""

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.compose import load_recipe
from recipes.errors import ConfigError
from train.comparison import HELD_OUT, TRAINING, Comparison, compare
from train.comparison_plots import kind, plot_comparison
from train.finished import read_run
from train.gaps import block_error, estimate, smooth, windows
from train.report import as_dict, write_report

STEPS = 200
MODULES = ("decoder.layers.0.mixer.in_proj", "decoder.layers.1.mlp.experts.linear_fc1")


class RunDirectory:
    """Writes a run directory as `python -m train` leaves it.

    Args:
        gap: relative gap of every loss to the curve that all runs with the same seed share,
            one number or a function of the step.
    """

    def __init__(
        self,
        folder: Path,
        precision: str = "bf16",
        seed: int = 1,
        gap: Any = 0.0,
        overrides: tuple[str, ...] = (),
        steps: int = STEPS,
        done: int | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        recipe = load_recipe(
            [
                "experiment=tiny",
                f"precision={precision}",
                f"run.dir={folder}",
                f"run.seed={seed}",
                f"stage.train_steps={steps}",
                *overrides,
            ]
        )
        self.write("config.json", asdict(recipe))
        noise = np.random.default_rng(seed).normal(0, 0.01, steps)
        self.records: list[dict[str, Any]] = []
        for i in range(done if done is not None else steps):
            factor = 1 + (gap(i) if callable(gap) else gap)
            loss = (4 + 4 * math.exp(-i / 20)) * (1 + noise[i]) * factor
            self.records.append(
                {
                    "step": i + 1,
                    "loss": loss,
                    "mtp_loss": [1.1 * loss, 1.2 * loss],
                    "grad_norm": 2.0 if precision == "bf16" else 3.0,
                    "tokens": (i + 1) * 2048,
                    "seconds": 9.0 if i == 0 else 0.5 if precision == "bf16" else 0.75,
                    "tokens_per_second": 2048 / 0.5,
                    "zero_grad_share": 0.01,
                    "updated": True,
                }
            )
            if (i + 1) % 50 == 0:
                self.records[-1]["validation_loss"] = 5 * factor
        self.save()
        self.identity(f"weights {seed}", f"order {seed}", f"recipe {seed}")
        quantized = precision if precision in ("nvfp4", "mxfp8") else "bf16"
        self.formats({MODULES[0]: (quantized, quantized), MODULES[1]: ("bf16", "bf16")})

    def write(self, name: str, content: Any) -> None:
        (self.folder / name).write_text(json.dumps(content))

    def save(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        (self.folder / "metrics.jsonl").write_text(lines)

    def identity(self, weights: str, order: str, recipe: str) -> None:
        names = ("initial_parameters", "data_order", "recipe_without_precision")
        self.write("identity.json", dict(zip(names, (weights, order, recipe), strict=True)))

    def formats(self, modules: dict[str, tuple[str, str]]) -> None:
        said = {name: {"wanted": w, "ran": r} for name, (w, r) in modules.items()}
        self.write("precision.json", {"applied": [{"from_step": 1, "modules": said}]})


class Workbench:
    """Run directories of one test, compared in the order they were made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs: list[RunDirectory] = []

    def run(self, **what: Any) -> RunDirectory:
        self.runs.append(RunDirectory(self.root / f"run{len(list(self.root.iterdir()))}", **what))
        return self.runs[-1]

    def compare(self, budget: float = 0.01) -> Comparison:
        return compare([read_run(run.folder) for run in self.runs], budget)

    def verdict(self, budget: float = 0.01) -> tuple[bool, str, str]:
        """Of the only arm: passed, failures, notes."""
        (arm,) = self.compare(budget).arms
        verdict = arm.verdict
        return verdict.passed, " | ".join(verdict.failures), " | ".join(verdict.notes)

    def refused(self) -> str:
        with pytest.raises(ConfigError) as error:
            self.compare()
        return str(error.value)


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


@pytest.mark.parametrize(
    ("gap", "passed"),
    [(0.005, True), (0.02, False), (-0.02, True), (0.0099, True), (0.0101, False)],
)
def test_a_constant_gap_is_found_everywhere(bench: Workbench, gap: float, passed: bool) -> None:
    bench.run()
    bench.run(precision="nvfp4", gap=gap)
    (arm,) = bench.compare().arms
    assert arm.verdict.passed is passed
    for gaps in (arm.training, *arm.mtp):
        assert set(gaps) == {"early", "stable", "decay", "last quarter"}
        for found in gaps.values():
            assert found is not None
            assert found.mean == pytest.approx(gap, abs=1e-9)
            assert found.error == pytest.approx(0, abs=1e-9)
    assert arm.held_out["end"] is not None
    assert arm.held_out["end"].mean == pytest.approx(gap, abs=1e-9)
    assert all(not pair.unpaired for pair in arm.pairs)


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


def test_a_gap_that_grows_in_the_decay(bench: Workbench) -> None:
    """0.2 % until step 160, then up to 4.2 % in 40 equal steps."""
    bench.run()
    bench.run(precision="nvfp4", gap=lambda i: 0.002 + 0.001 * max(0, i - 159))
    (arm,) = bench.compare().arms
    means = {name: found.mean for name, found in arm.training.items() if found}
    assert means["early"] == pytest.approx(0.002)
    assert means["stable"] == pytest.approx(0.002)
    assert means["decay"] == pytest.approx(0.002 + 0.001 * 20.5)
    assert means["last quarter"] == pytest.approx(0.002 + 0.001 * 20.5 * 40 / 50)
    assert not arm.verdict.passed
    found = arm.training["last quarter"]
    assert found is not None and found.error is not None and found.error > 0.002


def test_noise_near_the_budget_is_said_and_the_mean_decides(bench: Workbench) -> None:
    bench.run()
    jump = np.random.default_rng(5).normal(0, 0.01, STEPS)
    jump[150:] -= jump[150:].mean()
    bench.run(precision="nvfp4", gap=lambda i: 0.0095 + jump[i])
    passed, failures, notes = bench.verdict()
    assert passed and not failures
    assert "within noise of the budget" in notes
    assert "one pair of runs" in notes
    passed, failures, notes = bench.verdict(budget=0.009)
    assert not passed and "not below the budget of 0.9 %" in failures
    assert "within noise of the budget" in notes
    assert "within noise" not in bench.verdict(budget=0.05)[2]


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


def test_seeds_are_paired_by_seed_and_give_the_noise_floor(bench: Workbench) -> None:
    for seed in (1, 2):
        bench.run(seed=seed)
    for seed, gap in ((2, 0.004), (1, 0.002)):
        bench.run(precision="nvfp4", seed=seed, gap=gap)
    comparison = bench.compare()
    (arm,) = comparison.arms
    assert [(pair.arm.seed, pair.base.seed) for pair in arm.pairs] == [(2, 2), (1, 1)]
    last = arm.training["last quarter"]
    assert last is not None
    assert last.mean == pytest.approx(0.003)
    assert (last.low, last.high) == (pytest.approx(0.002), pytest.approx(0.004))
    assert arm.verdict.notes == []
    means = [statistics.fmean(r["loss"] for r in run.records[150:]) for run in bench.runs[:2]]
    floor = statistics.stdev(means) / statistics.fmean(means)
    assert comparison.noise["last quarter"] == pytest.approx(floor)
    assert comparison.noise["held-out"] == pytest.approx(0)


def test_one_precision_with_another_seed_passes_and_is_called_unpaired(bench: Workbench) -> None:
    bench.run(seed=1)
    bench.run(seed=2)
    (arm,) = bench.compare().arms
    assert arm.verdict.passed
    assert arm.verdict.measure == HELD_OUT
    (why,) = (note for note in arm.verdict.notes if note.startswith("not paired"))
    assert "initial weights, data order and recipes differ" in why
    assert "run.seed 1 -> 2" in why


def test_other_text_is_judged_by_the_held_out_loss(bench: Workbench) -> None:
    bench.run(seed=1)
    run = bench.run(seed=2, gap=0.05)
    for record in run.records:
        if "validation_loss" in record:
            record["validation_loss"] = 5 * 1.004
    run.save()
    (arm,) = bench.compare().arms
    assert arm.verdict.passed and arm.verdict.gap is not None
    assert arm.verdict.gap.mean == pytest.approx(0.004)
    for record in run.records:
        record.pop("validation_loss", None)
    run.save()
    (arm,) = bench.compare().arms
    assert not arm.verdict.passed and arm.verdict.measure == TRAINING


@pytest.mark.parametrize(("precision", "passed"), [("bf16", True), ("nvfp4", False)])
def test_seed_noise_excuses_only_the_precision_of_the_baseline(
    bench: Workbench, precision: str, passed: bool
) -> None:
    """Other text: losses differ by 0.2 % standard error, held-out losses by 1.2 %."""
    bench.run(seed=1)
    run = bench.run(seed=2, precision=precision)
    for record in run.records:
        if "validation_loss" in record:
            record["validation_loss"] = 5 * 1.012
    run.save()
    found, failures, notes = bench.verdict()
    assert found is passed
    assert ("passes though the gap is above the budget" in notes) is passed
    assert ("not below the budget" in failures) is not passed
    # Sure to be apart: no excuse.
    for record in run.records:
        if "validation_loss" in record:
            record["validation_loss"] = 5 * 1.03
    run.save()
    assert not bench.verdict()[0]


def test_steps_that_alternate_are_no_more_certain_than_independent_ones() -> None:
    """Blocks of two steps agree exactly, and would say that there is no error."""
    values = [0.01, -0.01] * 5
    expected = statistics.stdev(values) / math.sqrt(10)
    assert block_error(np.array(values)) == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["nvfp4", "mxfp8"])
def test_an_ignored_policy_fails(bench: Workbench, precision: str) -> None:
    bench.run()
    bench.run(precision=precision)
    passed, failures, _ = bench.verdict()
    assert not passed
    assert f"exactly the losses of {bench.runs[0].folder} in every step" in failures
    assert f"precision={precision} was ignored" in failures


def test_the_same_losses_without_a_claim_pass(bench: Workbench) -> None:
    bench.run()
    bench.run(precision="bf16", overrides=("logging.wandb=offline",))
    assert bench.verdict()[0]


def test_modules_in_another_format_fail(bench: Workbench) -> None:
    bench.run()
    run = bench.run(precision="nvfp4", gap=0.001)
    run.formats({MODULES[0]: ("nvfp4", "nvfp4"), MODULES[1]: ("nvfp4", "bf16")})
    passed, failures, _ = bench.verdict()
    assert not passed
    assert f"{MODULES[1]} in bf16 instead of nvfp4" in failures
    assert MODULES[0] not in failures


def test_a_wrong_baseline_fails(bench: Workbench) -> None:
    bench.run().formats({MODULES[0]: ("bf16", "nvfp4")})
    bench.run(precision="nvfp4", gap=0.001)
    assert "in nvfp4 instead of bf16" in bench.verdict()[1]


def test_a_claim_that_quantised_nothing_fails(bench: Workbench) -> None:
    bench.run()
    run = bench.run(precision="nvfp4", gap=0.001)
    run.formats(dict.fromkeys(MODULES, ("bf16", "bf16")))
    assert "precision=nvfp4 quantised no module" in bench.verdict()[1]


def test_an_older_run_is_not_proved_only_where_it_claims(bench: Workbench) -> None:
    for name in ("identity.json", "precision.json"):
        (bench.run().folder / name).unlink()
    passed, failures, notes = bench.verdict()
    assert passed and not failures
    assert "run0 has no identity.json" in notes
    (bench.run(precision="nvfp4", gap=0.001).folder / "precision.json").unlink()
    arms = bench.compare().arms
    assert [arm.name for arm in arms] == ["nvfp4"]
    assert not arms[0].verdict.passed
    assert "not proved: " in arms[0].verdict.failures[0]


def test_equal_seeds_with_other_weights_are_not_paired(bench: Workbench) -> None:
    bench.run()
    bench.run(precision="nvfp4", gap=0.001).identity("other weights", "order 1", "recipe 1")
    passed, _, notes = bench.verdict()
    assert passed
    assert "not paired" in notes and "initial weights differ" in notes


def test_losses_that_are_not_finite_fail(bench: Workbench) -> None:
    bench.run()
    run = bench.run(precision="nvfp4", gap=0.001)
    run.records[70] |= {"loss": None, "updated": False}
    run.save()
    passed, failures, _ = bench.verdict()
    assert not passed and "not finite at step 71" in failures


def test_a_run_that_diverged_fails_instead_of_being_unfinished(bench: Workbench) -> None:
    bench.run()
    run = bench.run(precision="nvfp4", gap=0.001, done=120)
    assert f"{run.folder} has done 120 of 200 steps; finish it" in bench.refused()
    run.write("bad_steps.json", [{"step": 121, "action": "stop"}])
    passed, failures, _ = bench.verdict()
    assert not passed
    assert "not finite at step 121" in failures
    assert "no training loss in the last quarter" in failures
    write_report(bench.compare(), bench.root, plot_comparison(bench.compare(), bench.root / "p"))


def test_what_cannot_be_compared_is_named(bench: Workbench, tmp_path: Path) -> None:
    bench.run()
    assert "two or more" in bench.refused()
    bench.run(steps=100)
    assert "run1 has 100 steps" in bench.refused() and "run0 200" in bench.refused()
    bench.runs[1:] = []
    run = bench.run(overrides=("stage.global_batch_size=16",))
    for record in run.records:
        record["tokens"] *= 2
    run.save()
    assert "run2 has read 4096 tokens at step 1" in bench.refused()
    run.records[41:42] = []
    run.save()
    assert "lacks step 42" in bench.refused()
    (run.folder / "config.json").write_text("{")
    assert "damaged" in bench.refused()
    with pytest.raises(ConfigError, match="not a run that can be compared"):
        read_run(tmp_path / "nothing")


def test_a_run_without_a_last_quarter_is_refused(bench: Workbench) -> None:
    bench.run(steps=3)
    bench.run(precision="nvfp4", steps=3)
    assert "train at least 4 steps" in bench.refused()


def test_the_same_run_twice_is_refused(bench: Workbench) -> None:
    bench.run()
    bench.runs *= 2
    assert "different directories" in bench.refused()


def test_cost_and_report(bench: Workbench) -> None:
    bench.run()
    run = bench.run(precision="nvfp4", gap=0.005)
    lines = [
        {"step": s, "module": m, "tensor": t, "format": "nvfp4", "flushed": f}
        for s in (10, 20)
        for m, t, f in (
            (MODULES[0], "activation", 0.01 * s),
            (MODULES[1], "weight", 0.02),
            ("mtp.layers.0.mtp_model_layer.layers.1.mlp.experts.linear_fc1", "weight", 0.0),
        )
    ]
    lines.append({"step": 10, "module": MODULES[0], "tensor": "wgrad", "zeros": 0.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "precision.jsonl").write_text(text)
    comparison = bench.compare()
    (arm,) = comparison.arms
    assert arm.flushed()["activation"] == {MODULES[0]: pytest.approx(0.15)}
    # Medians: the slow first step does not count.
    assert arm.cost.seconds_ratio == pytest.approx(1.5)
    assert arm.cost.grad_norm_ratio == pytest.approx(1.5)
    plots = plot_comparison(comparison, bench.root / "plots")
    assert [p.name for p in plots] == ["loss_gap.png", "loss.png", "flushed-nvfp4.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots)
    write_report(comparison, bench.root, plots)
    report = (bench.root / "report.md").read_text()
    assert "**nvfp4: PASS: mean relative gap of the training loss in the last quarter" in report
    for words in ("+0.5 %", "MTP depth 2", "weights 1", "bf16: 1, nvfp4: 1", "plots/loss_gap.png"):
        assert words in report
    assert f"{MODULES[0]} | activation | 15 %" in report
    data = json.loads((bench.root / "report.json").read_text())
    assert data == json.loads(json.dumps(as_dict(comparison)))
    assert data["passed"] is True
    assert data["arms"]["nvfp4"]["training_loss_gap"]["last quarter"]["mean"] == pytest.approx(
        0.005
    )


ABLATION = ("experiment=tiny_moe_ablation", "model=tiny_moe")


def test_models_are_compared_side_by_side(bench: Workbench) -> None:
    """Two models are paired by data order and settings, not by weights they cannot share."""
    bench.run(overrides=ABLATION)
    bench.run(overrides=(*ABLATION, "model=tiny_latent_moe"), gap=-0.004)
    for run, weights in zip(bench.runs, "ab", strict=True):
        run.identity(weights, "order 1", f"recipe {weights}")
    comparison = bench.compare()
    (arm,) = comparison.arms
    assert (comparison.base_name, arm.name) == ("tiny_moe", "tiny_latent_moe")
    assert arm.verdict.passed and not arm.pairs[0].unpaired
    assert arm.verdict.gap is not None and arm.verdict.gap.mean == pytest.approx(-0.004)
    base, latent = comparison.models.values()
    assert (base.parameters, latent.parameters) == (6_047_936, 6_105_472)
    assert (base.active, latent.active) == (2_640_064, 2_632_064)
    assert (base.dispatched_bytes, latent.dispatched_bytes) == (2 * 3 * 128 * 2, 2 * 11 * 32 * 2)
    assert base.settings == {"num_moe_experts": 16, "moe_router_topk": 3, "moe_latent_size": None}
    write_report(comparison, bench.root, [])
    report = (bench.root / "report.md").read_text()
    assert "| active parameters of a token | 2,640,064 | 2,632,064 (-0.303 %) |" in report
    assert "| `moe_latent_size` | None | 32 |" in report
    assert "same hash of initial weights" not in report
    assert "different initial weights" not in report and "other initial weights" in report


@pytest.mark.parametrize(
    ("order", "overrides", "said"),
    [
        ("order 2", (), "data order differs"),
        ("order 1", ("optimizer.lr=1e-4",), "optimizer.lr 0.006 -> 0.0001"),
        ("order 1", ("precision=nvfp4",), "precision bf16 -> nvfp4"),
    ],
)
def test_models_that_differ_in_more_are_not_paired(
    bench: Workbench, order: str, overrides: tuple[str, ...], said: str
) -> None:
    bench.run(overrides=ABLATION)
    bench.run(overrides=(*ABLATION, "model=tiny_latent_moe", *overrides))
    bench.runs[1].identity("other", order, "other")
    (arm,) = bench.compare().arms
    (why,) = arm.pairs[0].unpaired
    assert said in why


def test_recipes_of_one_name_are_told_apart(bench: Workbench) -> None:
    bench.run()
    bench.run(precision="nvfp4", gap=0.001)
    bench.run(precision="nvfp4", gap=0.002, overrides=("precision.disable_rht=true",))
    names = [arm.name for arm in bench.compare().arms]
    assert names == [f"nvfp4 in {run.folder}" for run in bench.runs[1:]]


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("decoder.layers.12.mixer.in_proj", ("12", "mixer.in_proj")),
        ("mtp.layers.0.eh_proj", ("mtp 0", "eh_proj")),
        ("mtp.layers.1.mtp_model_layer.layers.0.mlp.fc1", ("mtp 1.0", "mlp.fc1")),
    ],
)
def test_places_of_modules(module: str, place: tuple[str, str]) -> None:
    assert kind(module) == place
