"""Every shipped experiment shows itself on the command line, resolved."""

import sys

import pytest
import yaml

from recipes.compose import choices, load_recipe, run_cli


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_cfg_prints_the_recipe_and_starts_nothing(
    experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", f"experiment={experiment}", "--cfg"])
    with pytest.raises(SystemExit) as end:
        run_cli(lambda recipe: 1, "train")
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    recipe = load_recipe([f"experiment={experiment}"])
    assert shown["model"]["hybrid_layer_pattern"] == recipe.model.hybrid_layer_pattern
    assert shown["stage"]["global_batch_size"] == recipe.stage.global_batch_size
    assert shown["run"]["dir"] == recipe.run.dir and "$" not in recipe.run.dir
