"""The comparison of models, on run directories made up with gaps that are known."""

from pathlib import Path

import pytest

from tests.unit.run_directories import Workbench
from train.report import write_report


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


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
