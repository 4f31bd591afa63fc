"""A comparison must not believe a run that does not do what it claims."""

import json
from pathlib import Path

from tests.end_to_end.training import Command, train

IGNORED = """
import precision.apply
precision.apply.apply_policy = lambda chunks, policy, consumed_tokens=0: None
precision.apply.transformer_fields = lambda *args: {}
"""
"""Python code: no module is given its format, and Megatron opens no context that quantises, so
all compute in BF16."""

DENIED = """
honest = precision.apply.applied_formats
precision.apply.applied_formats = lambda *args: {n: (w, w) for n, (w, _) in honest(*args).items()}
"""
"""And whoever asks is told that they computed in their formats."""


DEGRADED = """
import os
import precision.apply
precision.apply.environment = lambda precision: {}
os.environ |= {"NVTE_NVFP4_DISABLE_RHT": "1", "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": "1"}
"""
"""And: NVFP4 without the Hadamard transform and stochastic rounding, whatever the recipe says."""


def sabotaged(command: Command, folder: Path, code: str) -> Command:
    """The command, and every process it starts, with `code` run before anything else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    root = Path(__file__).parents[2]
    command.environment = {"PYTHONPATH": f"{folder}:{root}"}
    return command


def test_an_arm_that_ignores_its_policy_fails_the_comparison(data: Path, tmp_path: Path) -> None:
    compared = tmp_path / "compared"
    overrides = train(data, compared, "stage.train_steps=4").overrides
    arms = "compare.precisions=[bf16,nvfp4]"
    command = Command([*overrides, arms], data, "train.compare")
    output = sabotaged(command, tmp_path / "code", IGNORED).run(code=1)
    assert "decoder.layers.0.mixer.in_proj ran in bf16 instead of nvfp4" in output
    assert "nvfp4-1234: FAIL: it did not compute in the formats of its policy" in output
    assert not (compared / "report.md").exists()


def test_a_run_that_lies_about_its_formats_fails(
    data: Path, straight: Path, tmp_path: Path
) -> None:
    liar = tmp_path / "liar"
    command = train(data, liar, "precision=nvfp4", "checkpoint.save_interval=6")
    sabotaged(command, tmp_path / "code", IGNORED + DENIED).run()
    (applied,) = json.loads((liar / "precision.json").read_text())["applied"]
    assert "nvfp4" in {m["ran"] for m in applied["modules"].values()}
    runs = [f"compare.runs=[{straight},{liar}]", f"run.dir={tmp_path}/compared"]
    output = Command(runs, data, "train.compare").run(code=1)
    assert "nvfp4: FAIL" in output
    report = json.loads((tmp_path / "compared" / "report.json").read_text())
    (arm,) = report["arms"].values()
    assert not arm["verdict"]["passed"]
    assert any("ignored" in text for text in arm["verdict"]["failures"]), arm["verdict"]


def test_an_arm_without_transform_and_stochastic_rounding_fails(data: Path, tmp_path: Path) -> None:
    command = train(data, tmp_path / "run", "precision=nvfp4", "stage.train_steps=1")
    output = sabotaged(command, tmp_path / "code", DEGRADED).run(code=5)
    assert "mixer.in_proj ran in nvfp4 without rht, stochastic_rounding instead of nvfp4" in output
