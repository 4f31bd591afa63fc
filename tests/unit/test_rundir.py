"""Whose a run directory is."""

import errno
import json
import os
from pathlib import Path

import pytest

from model.backends import install_backends
from recipes.compose import load_recipe
from recipes.errors import ConfigError
from train import rundir


def prepared(folder: Path, *overrides: str) -> list[str]:
    recipe = load_recipe(["experiment=tiny", f"run.dir={folder}", *overrides])
    changes = rundir.check(recipe)
    rundir.prepare(recipe, install_backends("host"))
    return changes


def test_a_mistake_made_before_the_first_step_can_be_mended(tmp_path: Path) -> None:
    prepared(tmp_path, "optimizer.lr=1")
    assert prepared(tmp_path, "optimizer.lr=2") == []  # nothing was trained with 1
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"another configuration \(optimizer.lr: 2.0 -> 3.0\)"):
        prepared(tmp_path, "optimizer.lr=3")
    assert prepared(tmp_path, "optimizer.lr=2", "stage.train_steps=7") == [
        "stage.train_steps: 300 -> 7"
    ]


def test_a_key_younger_than_the_run_had_its_default(tmp_path: Path) -> None:
    prepared(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["precision"]["disable_rht"], config["precision"]["rules"], config["compare"]
    path.write_text(json.dumps(config))
    assert prepared(tmp_path) == ["precision.rules.0.why:  -> nothing is quantised"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"\(precision.disable_rht: False -> True\)"):
        prepared(tmp_path, "precision.disable_rht=true")


def test_the_model_of_a_run_is_asked_for_by_what_reads_its_checkpoint(tmp_path: Path) -> None:
    """One of other weights, and one whose weights would fit."""
    prepared(tmp_path)

    def check(*overrides: str) -> None:
        rundir.check_model(load_recipe(["experiment=tiny", f"run.dir={tmp_path}", *overrides]))

    check("precision=nvfp4", "model.hybrid_layer_pattern=ME|MEM*|EME/*E/*E")
    for key, value in (("hidden_size", 256), ("moe_router_topk", 1)):
        with pytest.raises(ConfigError, match=rf"another model \(model.{key}: \d+ -> {value}\)"):
            check(f"model.{key}={value}")


def test_latest_may_name_a_copy_of_a_checkpoint(tmp_path: Path) -> None:
    latest = tmp_path / "checkpoints" / "latest"
    assert rundir.steps_done(tmp_path) == 0
    latest.parent.mkdir()
    for name, steps in (("iter_0000040", 40), ("iter_0000040-keep", 40), ("mine", 0)):
        latest.write_text(f"{name}\n")
        assert rundir.steps_done(tmp_path) == steps


def test_metrics_of_nobody(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="holds metrics of a run without its config.json"):
        prepared(tmp_path)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space and start again"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EROFS, "choose a directory you can write to"),
        (errno.EACCES, "choose a directory you can write to"),
    ],
)
def test_what_the_file_system_says_comes_with_a_remedy(
    code: int, remedy: str, tmp_path: Path
) -> None:
    with (
        pytest.raises(ConfigError, match=f"run.dir={tmp_path}: {os.strerror(code)}; {remedy}"),
        rundir.usable(tmp_path),
    ):
        raise OSError(code, os.strerror(code))
