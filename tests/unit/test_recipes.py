"""Composing recipes: what overrides what, and what a mistake is answered with."""

import ast
import inspect
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes import schema
from recipes.compose import choices, groups, load_recipe, run_cli, to_yaml
from recipes.errors import ConfigError
from recipes.keys import describe_keys, nearest, plain_key, valid_keys


def message(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(overrides, config_dir)
    return str(error.value)


# Composition


def test_tiny_is_an_overlay_of_super():
    """What the overlay does not name is Super's."""
    tiny = asdict(load_recipe(["experiment=tiny"]).model)
    full = asdict(load_recipe(["experiment=super_120b_a12b"]).model)
    same = {key for key in tiny if tiny[key] == full[key]}
    assert {
        "moe_router_score_function",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "mtp_use_repeated_layer",
        "mtp_loss_scaling_factor",
        "mamba_d_conv",
    } <= same
    assert tiny["moe_latent_size"] and tiny["moe_shared_expert_intermediate_size"]
    assert set("ME*/") <= set(tiny["hybrid_layer_pattern"])


@pytest.mark.parametrize(
    ("experiment", "published"),
    [
        ("nano_30b_a3b", (25e12, 8.4e9, 5e12, 1e-3, 1e-5)),
        ("super_120b_a12b", (25e12, 200e9, 5e12, 4.5e-4, 4.5e-6)),
        ("ultra_550b_a55b", (20e12, 200e9, 5e12, 2.5e-4, 2.5e-6)),
    ],
)
def test_published_training_settings(experiment, published):
    recipe = load_recipe([f"experiment={experiment}"])
    stage, optimizer = recipe.stage, recipe.optimizer
    assert stage.train_tokens == optimizer.lr_schedule_tokens
    assert published == (
        stage.train_tokens,
        optimizer.lr_warmup_tokens,
        optimizer.lr_wsd_decay_tokens,
        optimizer.lr,
        optimizer.min_lr,
    )
    assert stage.global_batch_size * stage.sequence_length == 25_165_824
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)


def test_command_line_beats_experiment_beats_group():
    assert load_recipe(["optimizer=super"]).checkpoint.save_interval is None
    assert load_recipe(["experiment=tiny"]).checkpoint.save_interval == 100
    assert load_recipe(["experiment=tiny", "checkpoint.save_interval=7"]).checkpoint == (
        schema.CheckpointConfig(save_interval=7)
    )
    # A group chosen on the command line replaces the one the experiment chose.
    assert load_recipe(["experiment=tiny", "optimizer=nano"]).optimizer.lr == 1e-3
    assert load_recipe(["experiment=tiny", "optimizer=nano", "optimizer.lr=2"]).optimizer.lr == 2


def test_run_directory_follows_the_name():
    assert load_recipe(["experiment=tiny"]).run.dir == "runs/tiny"
    assert load_recipe(["experiment=tiny", "model.name=mine"]).run.dir == "runs/mine"
    assert load_recipe(["experiment=parity"]).run.dir == "runs/parity"  # its own
    assert load_recipe(["experiment=parity", "run.dir=mine"]).run.dir == "mine"


@pytest.mark.parametrize("group", sorted(set(groups()) - {"experiment"}))
def test_every_shipped_choice_composes(group):
    for choice in choices(group):
        load_recipe(["experiment=tiny", f"{group}={choice}"])


def test_yaml_holds_the_whole_recipe():
    recipe = load_recipe(["experiment=tiny", "data.train=[{path: a, weight: 3}]"])
    again = OmegaConf.merge(OmegaConf.structured(schema.Recipe), OmegaConf.create(to_yaml(recipe)))
    assert OmegaConf.to_object(again) == recipe


def test_elements_of_lists_can_be_set():
    recipe = load_recipe(["data.train=[{path: a}, {path: b}]", "data.train.1.weight=3"])
    assert [(entry.path, entry.weight) for entry in recipe.data.train] == [("a", 1), ("b", 3)]


# Mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hiden_size=3", ["model.hiden_size", "did you mean model.hidden_size?"]),
        ("hidden_size=3", ["did you mean model.hidden_size?"]),
        ("hiden_size=3", ["did you mean model.hidden_size?"]),
        ("model.lr=3", ["did you mean optimizer.lr?"]),
        ("parallel.tensor_model_parallel=2", ["did you mean parallel.tensor_model_parallel_size?"]),
        ("modle=tiny", ["did you mean model?"]),
        ("qqqq=1", ["the groups are cluster, data, experiment, model", "--keys"]),
        ("model.qqqq=1", ["unknown key model.qqqq", "--keys"]),
        ("model=tinny", ["model=tinny", "nano_30b_a3b", "tiny"]),
        ("experiment=null", ["experiment=null", "use one of", "tiny"]),
        ("data=3", ["data=3", "use one of", "code"]),
        ("model=[tiny,tinny]", ["model=[tiny,tinny]", "use one of"]),
        ("+model.x=1", ["+model.x=1", "neither be added", "write KEY=VALUE"]),
        ("++model.hidden_size=1", ["neither be added"]),
        ("~model.name", ["nor deleted"]),
        ("optimizer.lr=1,2", ["one run takes one value", "[A,B]"]),
        ("model.name", ["model.name is not an override", "KEY=VALUE"]),
        ("model.hidden_size=big", ["model.hidden_size", "'big'", "it takes int"]),
        ("model.hidden_size=1.5", ["model.hidden_size", "'1.5'", "it takes int"]),
        ("model.hidden_size=null", ["model.hidden_size", "it takes int"]),
        ("stage.train_steps=1e3", ["stage.train_steps", "it takes int | None"]),
        ("parallel.sequence_parallel=maybe", ["'maybe'", "it takes bool | None"]),
        ("parallel.recompute_modules=moe", ["recompute_modules", "it takes list[str] | None"]),
        ("stage={train_stepz: 3}", ["stage.train_stepz", "did you mean stage.train_steps?"]),
        ("data.train=3", ["data.train", "list[BlendEntry]"]),
        ("data.train=[3]", ["data.train[0]", "BlendEntry"]),
        ("data.train=[{path: a, weigth: 3}]", ["data.train[0].weigth", "data.train[].weight?"]),
        ("data.train=[{path: a, qq: 3}]", ["data.train[0].qq", "takes data.train[].path, data"]),
        ("data.train=[{path: a, weight: x}]", ["data.train", "weight", "'x'"]),
        ("data.train=[{weight: 2}]", ["data.train[0].path is set by no recipe"]),
    ],
)
def test_mistakes_on_the_command_line(override, said):
    text = message("experiment=tiny", override)
    for words in said:
        assert words in text
    assert "\n" not in text


def test_nearest_prefers_the_exact_leaf():
    keys = ["model.name", "optimizer.lr", "stage.name"]
    assert nearest("model.lr", keys, ["model"]) == "did you mean optimizer.lr?"
    assert nearest("model.zzz", keys, ["model"]) == (
        "the groups are model; --keys prints every key"
    )


def test_plain_key_of_an_element():
    assert plain_key("data.train[0].path") == plain_key("data.train.0.path") == "data.train[].path"
    assert plain_key("model.mamba_d_conv") == "model.mamba_d_conv"


# The schema explains itself


def test_every_field_has_a_docstring():
    tree = ast.parse(inspect.getsource(schema))
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name != "Recipe"):
        statements = node.body[1:]
        for field, doc in zip(statements[::2], statements[1::2], strict=True):
            assert isinstance(field, ast.AnnAssign), f"{node.name}: {ast.unparse(field)}"
            assert isinstance(doc, ast.Expr), f"{node.name}.{ast.unparse(field.target)}"


def test_keys_are_described():
    text = describe_keys()
    assert "model.hidden_size (int)\n    Model width d." in text
    assert "data.tokenizer.path (str | None)\n    Directory or file" in text
    assert "data.train[].weight (float)\n    Share of the samples" in text
    for field in fields(schema.ModelConfig):
        assert f"model.{field.name}" in valid_keys()


# Recipes of the user's own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recipes outside the package: a model, and experiments, some of them wrong."""
    files = {
        "model/mini.yaml": "defaults:\n  - tiny\n  - _self_\nname: mini\nhidden_size: 64\n",
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - tiny\n"
        "  - override /model: mini\n  - _self_\nstage:\n  train_steps: 7\n",
        "experiment/typo.yaml": "# @package _global_\nstage:\n  train_stepz: 7\n",
        "experiment/kind.yaml": "# @package _global_\nmodel:\n  hidden_size: big\n",
        "experiment/lost.yaml": "# @package _global_\ndefaults:\n  - override /model: nope\n",
        "experiment/group.yaml": "# @package _global_\ndefaults:\n  - override /modle: tiny\n",
        "experiment/broken.yaml": "# @package _global_\ndefaults:\n  - tiny\n  - : {\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_own_recipes_build_on_the_shipped_ones(folder):
    recipe = load_recipe(["experiment=mine", "stage.eval_steps=1"], folder)
    assert (recipe.model.name, recipe.model.hidden_size) == ("mini", 64)
    assert (recipe.stage.train_steps, recipe.stage.eval_steps) == (7, 1)
    assert recipe.model.moe_latent_size == 64  # tiny's
    # The folder is searched only when it is given.
    assert "no such recipe" in message("experiment=mine")


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        ("typo", ["experiment/typo", "stage.train_stepz", "did you mean stage.train_steps?"]),
        ("kind", ["experiment/kind", "model.hidden_size", "'big'", "it takes int"]),
        ("lost", ["model/nope", "use one of latent_moe_73b_a8b, mini, moe_73b_a8b, "]),
        ("group", ["experiment/group", "modle"]),
        ("broken", ["not valid YAML", "broken.yaml", "line 4"]),
        ("absent", ["experiment=absent", "broken, group, kind, lost, mine", "tiny"]),
    ],
)
def test_mistakes_in_own_recipes(folder, experiment, said):
    text = message(f"experiment={experiment}", config_dir=folder)
    for words in said:
        assert words in text


def test_folder_must_exist(tmp_path):
    assert "is not a folder" in message("experiment=tiny", config_dir=tmp_path / "none")


def test_shipped_names_are_taken(folder):
    (folder / "model" / "small.yaml").write_text("hidden_size: 3\n")
    text = message("experiment=small", config_dir=folder)
    assert "model/small.yaml" in text and "give it another name" in text


# The command line


def cli(monkeypatch, *arguments: str) -> tuple[int, list[schema.Recipe]]:
    """Exit code of run_cli and the recipes it handed over."""
    seen: list[schema.Recipe] = []
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_cli(seen.append, "some.module")
    return int(stop.value.code or 0), seen


def test_command_line_runs_main(monkeypatch, folder):
    code, seen = cli(monkeypatch, "experiment=mine", "--config-dir", str(folder))
    assert code == 0 and seen[0].stage.train_steps == 7
    code, seen = cli(monkeypatch, f"--config-dir={folder}", "experiment=mine")
    assert code == 0 and seen[0].stage.train_steps == 7


def test_help_lists_experiments_and_keys(monkeypatch, capsys):
    assert cli(monkeypatch, "--help") == (0, [])
    shown = capsys.readouterr().out
    assert "python -m some.module" in shown and "super_120b_a12b" in shown
    assert cli(monkeypatch, "--keys") == (0, [])
    assert "model.hidden_size (int)" in capsys.readouterr().out


def test_cfg_prints_the_resolved_recipe(monkeypatch, capsys):
    assert cli(monkeypatch, "experiment=tiny", "--cfg") == (0, [])
    assert "\n  hidden_size: 128\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experiment=tiny", "model.hidden=1"], "ConfigError: model.hidden=1: unknown key"),
        (["--verbose"], "ConfigError: --verbose is not an option; use --help"),
        (["--config-dir"], "ConfigError: --config-dir needs a value"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(monkeypatch, capsys, arguments, said):
    assert cli(monkeypatch, *arguments) == (2, [])
    captured = capsys.readouterr()
    assert captured.err.startswith(said) and captured.err.count("\n") == 1


def test_traceback_on_request(monkeypatch, capsys):
    assert cli(monkeypatch, "model.hidden=1", "traceback=true") == (2, [])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_recipes_are_a_leaf():
    """The package imports nothing else of ours and no torch."""
    code = (
        "import sys, recipes.compose, recipes.validate\n"
        "ours = {'model', 'parallel', 'precision', 'data', 'train', 'slurm', 'torch'}\n"
        "sys.exit(bool(ours & {name.split('.')[0] for name in sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
