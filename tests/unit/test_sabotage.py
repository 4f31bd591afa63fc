"""A comparison on a problem that NVFP4 solves with the parts of its recipe and not without them.

One layer, least absolute deviations, 256 tokens a step. One token of each Hadamard group of 16
counts 30 times as much as the others and has features of its own, learned at once; but a gradient
of absolute deviations does not shrink with the error. So the other fifteen are always below half
the smallest E2M1 step of their block (amax / 24): rounded to nearest they are zeros, and the
weights they need never move. Stochastic rounding keeps them in the mean, the transform spreads the
large one over the group.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.backends import install_backends
from recipes.compose import load_recipe
from tests.unit.run_directories import STEPS, Workbench
from train.compare import EXIT_FAILED, main
from train.guards import EXIT_COMPLETE

install_backends("host")

import transformer_engine.pytorch as te  # noqa: E402
from transformer_engine.common.recipe import NVFP4BlockScaling  # noqa: E402

TOKENS, INPUTS, OUTPUTS, WEIGHT = 256, 64, 64, 30.0


def losses(recipe: Any) -> list[float]:
    """Mean absolute deviation of each step; recipe None: BF16."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rare = (torch.arange(TOKENS) % 16 == 5)[:, None]
    features = torch.where(rare, torch.arange(INPUTS) < 16, torch.arange(INPUTS) >= 16)
    truth, weight = 0.06 * draw(OUTPUTS, INPUTS), torch.zeros(OUTPUTS, INPUTS)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16)
    found = []
    for step in range(STEPS):
        x = draw(TOKENS, INPUTS) * features
        target = x @ truth.T + draw(TOKENS, OUTPUTS) * ~rare
        layer.weight.data.copy_(weight)
        layer.weight.grad = None
        with te.autocast(enabled=recipe is not None, recipe=recipe):
            y = layer(x.bfloat16())
        deviation = (y.float() - target).abs()
        (deviation * torch.where(rare, WEIGHT, 1.0)).mean().backward()
        weight -= 0.1 * (1 - step / STEPS) * OUTPUTS * layer.weight.grad.float()
        found.append(float(deviation.mean()))
    return found


def test_a_recipe_without_its_parts_fails_where_it_passes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the degraded run says: it claims the whole recipe in every file."""
    bench = Workbench(tmp_path)
    degraded = NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True)
    runs = {"bf16": None, "whole": NVFP4BlockScaling(), "degraded": degraded}
    for name, recipe in runs.items():
        run = bench.run(precision="bf16" if name == "bf16" else "nvfp4")
        for record, loss in zip(run.records, losses(recipe), strict=True):
            record |= {"loss": loss, "mtp_loss": [loss, loss]}
        run.save()
    base, *arms = (run.folder for run in bench.runs)
    for arm, code, word in zip(arms, (EXIT_COMPLETE, EXIT_FAILED), ("PASS", "FAIL"), strict=True):
        overrides = [f"compare.runs=[{base},{arm}]", f"run.dir={arm}-compared"]
        monkeypatch.setattr(sys, "argv", ["compare", *overrides])
        assert main(load_recipe(overrides)) == code
        assert f"**nvfp4: {word}: " in Path(f"{arm}-compared/report.md").read_text()
