"""`python -m precision.sensitivity` on a run, and training in the recipe it writes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.end_to_end.training import Command, records, train

STUDY = (
    "precision=nvfp4",
    "precision.protected_layers=last 0",
    "sensitivity.batches=2",
    "sensitivity.budget=1e-5",
)


def study(data: Path, run: Path, *overrides: str) -> Command:
    return replace(train(data, run, *STUDY, *overrides), module="precision.sensitivity")


def test_measure_choose_and_train(data: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    # A format of validation, which is not what is measured.
    output = study(data, run, "precision.evaluation=bf16").run()
    folder = run / "sensitivity"
    report = json.loads((folder / "report.json").read_text())
    # The same weights, batches and formats as in the validation at the end of the BF16 run.
    assert report["measured_loss"] == records(straight)[-1]["validation_loss"]
    modules = {m["module"]: m for m in report["modules"]}
    in_proj = modules["decoder.layers.0.mixer.in_proj"]
    out_proj = modules["decoder.layers.0.mixer.out_proj"]
    assert (in_proj["format"], out_proj["format"]) == ("nvfp4", "mxfp8")
    assert all(abs(m["loss"]) > 0 for m in modules.values()), "each is felt"
    assert not any(name.startswith("mtp") for name in modules)
    policies = report["policies"]
    assert policies["everything quantised"]["flops"] == 0
    chosen = policies["fewest FLOPs within the budget"]
    assert chosen["gap"] <= 1e-5 < policies["everything quantised"]["gap"]
    for file in ("report.md", "tradeoff.png"):
        assert str(file) in {p.name for p in folder.iterdir()}
    assert f"{len(chosen['protected'])}" in output

    trained = tmp_path / "trained"
    place = ["--config-dir", str(folder)]
    command = train(data, trained, "precision=measured", "stage.train_steps=1")
    replace(command, overrides=[*place, *command.overrides]).run()
    (applied,) = json.loads((trained / "precision.json").read_text())["applied"]
    ran = {name: m["ran"] for name, m in applied["modules"].items()}
    for name, module in modules.items():
        assert ran[name] == ("bf16" if name in chosen["protected"] else module["format"])


@pytest.mark.slow
def test_refused_without_what_it_needs(data: Path, straight: Path, tmp_path: Path) -> None:
    assert "has no checkpoint" in study(data, tmp_path / "none").refused()
    nothing = replace(train(data, straight), module="precision.sensitivity")
    assert "quantises no module" in nothing.refused()


LAYOUTS = {
    "two ranks": ["parallel.data_parallel_size=2"],
    "virtual stages": [
        "parallel.pipeline_model_parallel_size=2",
        "model.hybrid_layer_pattern=M|E|*|E/*E/*E",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_measure_the_same(data: Path, straight: Path, tmp_path: Path, layout: str) -> None:
    losses = []
    for name, overrides in (("one", []), ("two", LAYOUTS[layout])):
        run = tmp_path / name
        shutil.copytree(straight, run)
        study(data, run, *overrides, "sensitivity.measure=protected").run()
        report = json.loads((run / "sensitivity" / "report.json").read_text())
        losses.append({m["module"]: m["loss"] for m in report["modules"]})
        assert report["measure"] == "protected"
    one, two = losses
    assert one == pytest.approx(two, rel=1e-3, abs=1e-7)
