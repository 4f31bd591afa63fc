"""`python -m model.describe`: every shipped experiment, and a mistake."""

import subprocess
import sys

import pytest

from model.backends import install_backends
from model.describe import main
from model.pattern import parse_pattern
from recipes.compose import choices, load_recipe


@pytest.fixture(scope="module", autouse=True)
def backends() -> None:
    install_backends("host")


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_describes_every_shipped_experiment(experiment, capsys):
    recipe = load_recipe([f"experiment={experiment}"])
    assert main(recipe) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    pattern = parse_pattern(recipe.model.hybrid_layer_pattern)
    assert lines[0].startswith(f"{recipe.model.name}: {pattern.num_layers} layers")
    # One row a layer, in order, then those of the MTP block.
    rows = [line.split()[:2] for line in lines if line.strip()[:1].isdigit()]
    expected = [*enumerate(pattern.main), *enumerate(pattern.mtp)]
    assert rows == [[str(i), symbol] for i, symbol in expected]


def totals(text: str) -> dict[str, str]:
    """The last table: name -> number."""
    rows = (line.rsplit(maxsplit=1) for line in text.split("\n\n")[-1].splitlines())
    return {name.strip(): number for name, number in rows}


def test_numbers_of_super(capsys):
    main(load_recipe(["experiment=super_120b_a12b"]))
    text = capsys.readouterr().out
    found = totals(text)
    assert found["parameters of a checkpoint"] == "123,611,033,088"
    assert found["main model"] == "120,668,707,840"
    assert found["multi-token prediction"] == "2,942,325,248"
    assert found["active per token, main model"] == "12,770,237,440"
    assert "initial std 0.01398, output projections 0.00149" in text
    assert "inner width 8192 = 128 heads * 64, 8 groups of 16 heads" in text
    assert "top 22 of 512 experts of 2688 at latent width 1024, shared expert 5376" in text
    assert "1 block, run 2 times" in text
    assert "ranks 64 = tensor and sequence 2" in text


def test_module_shares_add_up(capsys):
    main(load_recipe(["experiment=tiny"]))
    table = capsys.readouterr().out.split("\n\n")[-2].splitlines()
    assert table[0].split() == ["module", "parameters", "share", "MFLOP/token", "share"]
    rows = [line.split() for line in table[1:]]
    assert sum(int(row[1].replace(",", "")) for row in rows) == 3_396_432
    assert sum(float(row[4].rstrip("%")) for row in rows) == pytest.approx(100, abs=1)


def test_model_without_mtp_or_moe(capsys):
    main(
        load_recipe(
            ["experiment=tiny", "model.hybrid_layer_pattern=M*-", "model.ffn_hidden_size=64"]
        )
    )
    text = capsys.readouterr().out
    assert "MLP       inner width 64" in text
    assert "MoE" not in text and "multi-token prediction:" not in text


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "model.describe", *arguments], capture_output=True, text=True
    )


def test_command():
    done = command("experiment=tiny", "device=host")
    assert done.returncode == 0, done.stderr
    assert totals(done.stdout)["parameters of a checkpoint"] == "3,396,432"


def test_command_explains_a_mistake_before_building():
    done = command("experiment=tiny", "parallel.expert_model_parallel_size=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "ConfigError: parallel.expert_model_parallel_size=3 does not divide "
        "model.num_moe_experts=16 (16 % 3 = 1); use 1, 2, 4, 8 or 16\n"
    )
