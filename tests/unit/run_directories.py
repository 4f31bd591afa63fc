"""Run directories made up with gaps that are known, and their comparison."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.gemms import policy_of
from recipes.compose import load_recipe
from recipes.errors import StrataError
from train.comparison import Comparison, compare
from train.finished import read_run

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
        wanted = policy_of(recipe).wanted(0)
        self.modules = {name: (form, form) for name, form in wanted.items()}
        self.formats({})

    def write(self, name: str, content: Any) -> None:
        (self.folder / name).write_text(json.dumps(content))

    def save(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        (self.folder / "metrics.jsonl").write_text(lines)

    def identity(self, weights: str, order: str, recipe: str) -> None:
        names = ("initial_parameters", "data_order", "recipe_without_precision")
        self.write("identity.json", dict(zip(names, (weights, order, recipe), strict=True)))

    def formats(self, changes: dict[str, tuple[str, str]]) -> None:
        """Let precision.json say of modules what they were asked for and ran in."""
        modules = self.modules | changes
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
        with pytest.raises(StrataError) as error:
            self.compare()
        return str(error.value)
