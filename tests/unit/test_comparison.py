"""The comparison of precisions, on run directories made up with gaps that are known."""

import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.gemms import policy_of
from recipes.compose import load_recipe
from recipes.errors import ConfigError
from tests.unit.run_directories import MODULES, STEPS, Workbench
from train.comparison import HELD_OUT, TRAINING
from train.comparison_plots import plot_comparison
from train.finished import read_run
from train.heat_map import kind
from train.report import as_dict, write_report


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


@pytest.mark.parametrize("precision", ["nvfp4", "mxfp8"])
def test_an_ignored_policy_fails(bench: Workbench, precision: str) -> None:
    bench.run()
    bench.run(precision=precision)
    passed, failures, _ = bench.verdict()
    assert not passed
    assert f"exactly the losses of {bench.runs[0].folder} in every step" in failures
    assert f"precision={precision} was ignored" in failures


@pytest.mark.parametrize(
    "runs",
    [{"nvfp4": 0.0, "bf16": 0.0}, {"bf16": 0.001, "nvfp4": 0.0, "nvfp4_no_rht": 0.0}],
    ids=["of the baseline", "of one of two arms"],
)
def test_an_ignored_policy_fails_wherever_it_is(bench: Workbench, runs: dict[str, float]) -> None:
    for precision, gap in runs.items():
        bench.run(precision=precision, gap=gap)
    for arm in bench.compare().arms:
        assert any("nvfp4 was ignored" in text for text in arm.verdict.failures) or any(
            "nvfp4_no_rht was ignored" in text for text in arm.verdict.failures
        )


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
    run.formats(dict.fromkeys(run.modules, ("bf16", "bf16")))
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
    passed, failures, _ = bench.verdict()
    assert not passed
    assert "not paired" in failures and "initial weights differ" in failures
    bench.runs[1].identity("weights 1", "another order", "recipe 1")
    assert "data order differs" in bench.verdict()[1]
    for run in bench.runs:
        (run.folder / "identity.json").unlink()
    assert f"{bench.runs[1].folder} have no identity.json" in bench.verdict()[1]


@pytest.mark.parametrize("missing", ["initial_parameters", "data_order"])
def test_hashes_that_are_missing_prove_nothing(bench: Workbench, missing: str) -> None:
    for run in (bench.run(), bench.run(precision="nvfp4", gap=0.001)):
        identity = json.loads((run.folder / "identity.json").read_text())
        run.write("identity.json", {k: v for k, v in identity.items() if k != missing})
    passed, failures, _ = bench.verdict()
    assert not passed and "not proved: " in failures


def test_other_settings_are_no_seed(bench: Workbench) -> None:
    """A run of the baseline's precision and other settings is an arm of its own, and a quantised
    one of other settings fails."""
    bench.run()
    bench.run(seed=2)
    for precision, gap in (("bf16", 0.001), ("nvfp4", 0.002)):
        run = bench.run(precision=precision, gap=gap, overrides=("optimizer.lr=1e-2",))
        run.identity("weights 1", "order 1", "other recipe")
    comparison = bench.compare()
    assert [run.seed for run in comparison.base] == [1, 2]
    same, other = comparison.arms
    assert same.verdict.passed and "optimizer.lr" in " ".join(same.verdict.notes)
    assert not other.verdict.passed and "optimizer.lr" in " ".join(other.verdict.failures)


SWITCH = "precision.switch={to: bf16, at_fraction: 0.5}"


@pytest.mark.parametrize(
    ("precision", "overrides", "wrong"),
    [
        ("nvfp4_all", (), MODULES[0].replace("in_proj", "out_proj")),
        ("nvfp4", ("precision.disable_rht=true",), MODULES[0]),
        ("nvfp4", (SWITCH,), MODULES[0]),
        ("nvfp4", (SWITCH.replace("0.5", "1"),), ""),
    ],
)
def test_a_run_is_held_to_its_recipe_not_to_what_it_says(
    bench: Workbench, precision: str, overrides: tuple[str, ...], wrong: str
) -> None:
    """It says that it was asked for what precision=nvfp4 is, from the first step to the last."""
    bench.run()
    run = bench.run(precision=precision, gap=0.001, overrides=overrides)
    recipe = load_recipe(["experiment=tiny", "precision=nvfp4"])
    run.modules = {name: (form, form) for name, form in policy_of(recipe).wanted(0).items()}
    run.formats({})
    passed, failures, _ = bench.verdict()
    assert passed is not bool(wrong)
    assert wrong in failures


def test_a_switch_has_to_be_recorded_where_it_was(bench: Workbench) -> None:
    bench.run()
    run = bench.run(precision="nvfp4", gap=0.001, overrides=(SWITCH,))
    (first,) = json.loads((run.folder / "precision.json").read_text())["applied"]
    plain = {name: {"wanted": "bf16", "ran": "bf16"} for name in run.modules}
    for step, passes in ((101, True), (100, False)):
        run.write("precision.json", {"applied": [first, {"from_step": step, "modules": plain}]})
        assert bench.verdict()[0] is passes


@pytest.mark.parametrize(
    "bad",
    [{"loss": None, "updated": False}, {"mtp_loss": [9.0, None]}, {"validation_loss": None}],
)
def test_losses_that_are_not_finite_fail(bench: Workbench, bad: dict[str, Any]) -> None:
    bench.run()
    run = bench.run(precision="nvfp4", gap=0.001)
    run.records[70] |= bad
    run.save()
    passed, failures, _ = bench.verdict()
    assert not passed and "not finite at step 71" in failures


def test_a_gradient_of_zero_is_left_out(bench: Workbench) -> None:
    for precision, step in (("bf16", 190), ("nvfp4", 195)):
        run = bench.run(precision=precision, gap=0.001)
        run.records[step]["grad_norm"] = 0.0
        run.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (arm,) = bench.compare().arms
    assert arm.cost.grad_norm_ratio == pytest.approx(1.5)


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
    for name, text in (
        ("config.json", "{"),
        ("identity.json", '["weights"]'),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("metrics.jsonl", "[]\n"),
    ):
        file = run.folder / name
        whole = file.read_text()
        file.write_text(text)
        assert "damaged" in bench.refused(), (name, text)
        file.write_text(whole)
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
    assert comparison.flushed("nvfp4")["activation"] == {MODULES[0]: pytest.approx(0.15)}
    # Medians: the slow first step does not count.
    assert arm.cost.seconds_ratio == pytest.approx(1.5)
    assert arm.cost.grad_norm_ratio == pytest.approx(1.5)
    plots = plot_comparison(comparison, bench.root / "plots")
    assert [p.name for p in plots] == ["loss_gap.png", "loss.png", "flushed-nvfp4.png"]
    bench.runs.reverse()  # a baseline that quantises has a picture too
    swapped = bench.compare()
    pictures = plot_comparison(swapped, bench.root / "swapped")
    assert [p.name for p in pictures] == [p.name for p in plots]
    assert as_dict(swapped)["baseline"]["flushed_to_zero"] == comparison.flushed("nvfp4")
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots)
    write_report(comparison, bench.root, plots)
    report = (bench.root / "report.md").read_text()
    quantised = sum(ran == "nvfp4" for _, ran in run.modules.values())
    assert "**nvfp4: PASS: mean relative gap of the training loss in the last quarter" in report
    for words in (
        "+0.5 %",
        "MTP depth 2",
        "weights 1",
        f"nvfp4: {quantised}",
        "plots/loss_gap.png",
    ):
        assert words in report
    assert f"{MODULES[0]} | activation | 15 %" in report
    data = json.loads((bench.root / "report.json").read_text())
    assert data == json.loads(json.dumps(as_dict(comparison)))
    assert data["passed"] is True
    assert data["arms"]["nvfp4"]["training_loss_gap"]["last quarter"]["mean"] == pytest.approx(
        0.005
    )


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
