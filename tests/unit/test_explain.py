"""`python -m precision.explain`: the family against golden files, and what changes them."""

import subprocess
import sys
from pathlib import Path

import pytest

from precision.explain import main
from recipes.compose import load_recipe

GOLDEN = Path(__file__).with_name("golden")
SIZES = ("model.mamba_num_heads=32", "model.mamba_head_dim=8")


def explained(capsys: pytest.CaptureFixture[str], *overrides: str, code: int = 0) -> str:
    assert main(load_recipe([*overrides, "device=host"])) == code
    return capsys.readouterr().out


def tiny(capsys: pytest.CaptureFixture[str], *overrides: str, code: int = 0) -> str:
    return explained(capsys, "experiment=tiny", *SIZES, *overrides, code=code)


def shares(text: str) -> dict[str, tuple[int, float]]:
    """Of the last table of shares: format -> parameters, GFLOP a token."""
    table = text[text.rindex("\nformat ") :].split("\n\n")[0].splitlines()[2:]
    rows = [line.rsplit(maxsplit=4) for line in table]
    return {r[0]: (int(r[1].replace(",", "")), float(r[3].replace(",", ""))) for r in rows}


@pytest.mark.parametrize("experiment", ["nano_30b_a3b", "super_120b_a12b", "ultra_550b_a55b"])
def test_golden(experiment, capsys):
    """If a change is meant: write the new output to the file and look at the difference."""
    text = explained(capsys, f"experiment={experiment}", "precision=nvfp4")
    assert text == (GOLDEN / f"explain_{experiment}.txt").read_text()


def test_shares_by_hand(capsys):
    """Super: 33 routed-expert layers of 512 experts, 33 shared experts and 34 in_proj in NVFP4;
    34 out_proj in MXFP8; 40 routers in the decoder and one in the MTP block, run twice."""
    found = shares((GOLDEN / "explain_super_120b_a12b.txt").read_text())
    experts, shared = 2 * 1024 * 2688, 2 * 4096 * 5376
    in_proj, out_proj = 4096 * (2 * 8192 + 2 * 8 * 128 + 128), 8192 * 4096
    assert found["nvfp4"][0] == 33 * (512 * experts + shared) + 34 * in_proj
    assert found["mxfp8"][0] == 34 * out_proj
    assert found["router, fp32"][0] == 41 * (512 * 4096 + 512)
    assert found["total"][0] == 123_611_033_088
    # Three products of 2 FLOPs a weight; of the experts a token meets 22.
    nvfp4 = 6 * (33 * (22 * experts + shared) + 34 * in_proj)
    assert found["nvfp4"][1] == pytest.approx(nvfp4 / 1e9, abs=1e-3)
    assert found["router, fp32"][1] == pytest.approx(6 * 42 * 512 * 4096 / 1e9, abs=1e-3)


def test_shares_add_up(capsys):
    found = shares(tiny(capsys, "precision=nvfp4"))
    total = found.pop("total")
    assert sum(p for p, _ in found.values()) == total[0]
    assert sum(f for _, f in found.values()) == pytest.approx(total[1], abs=0.003)


def test_everything_in_one_format(capsys):
    text = tiny(capsys, "precision=nvfp4_all")
    assert {"nvfp4", "router, fp32", "never quantised, bf16", "total"} == set(shares(text))
    assert "W 16x16, nearest" in text and "mxfp8" not in text


def test_switches_show_in_the_operands(capsys):
    assert "dy 16x1, stochastic" in tiny(capsys, "precision=nvfp4_no_rht")
    assert "dy 16x1, Hadamard, nearest" in tiny(capsys, "precision=nvfp4_rtn")
    assert "W 1x16, nearest" in tiny(
        capsys, "precision=nvfp4", "precision.disable_2d_quantization=true"
    )


def test_own_rule_and_its_reason(capsys):
    text = tiny(
        capsys,
        "precision=nvfp4",
        "precision.extra_rules=[{layers: 1, module: 'mlp.experts.*', format: mxfp8, why: a try}]",
    )
    rule = next(line for line in text.splitlines() if line.startswith("extra_rules[0]"))
    assert rule.split() == ["extra_rules[0]", "1", "mlp.experts.*", "mxfp8", "2", "a", "try"]


def test_switch_to_a_forward_pass_in_bf16(capsys):
    """A third of the work of the quantised modules leaves the quantised formats."""
    switch = "precision.switch={to: bf16_forward, at_tokens: 2e9}"
    text = tiny(capsys, "precision=nvfp4_all", switch)
    before = shares(text[: text.index("validation:")])
    after = shares(text)
    assert "from 2,000,000,000 tokens on" in text
    assert "43 modules from nvfp4 / nvfp4 / nvfp4 to bf16 / nvfp4 / nvfp4" in text
    assert after["nvfp4"][1] == pytest.approx(before["nvfp4"][1] * 2 / 3, abs=2e-3)
    assert after["bf16"][1] == pytest.approx(before["nvfp4"][1] / 3, abs=2e-3)
    assert after["total"] == before["total"]


def test_validation_format(capsys):
    assert "validation: as in training" in tiny(capsys, "precision=nvfp4")
    text = tiny(capsys, "precision=nvfp4", "precision.evaluation=bf16")
    assert "validation: quantised modules run in bf16" in text


def test_sizes_of_the_validation_format_are_shown_and_fail(capsys):
    """656 rows divide into NVFP4's blocks, not into those of MXFP8."""
    sizes = ("model.mamba_num_heads=16", "model.mamba_head_dim=16")
    chosen = ("experiment=tiny", "precision=nvfp4", *sizes)
    assert "validation: as" in explained(capsys, *chosen)
    text = explained(capsys, *chosen, "precision.evaluation=mxfp8", code=1)
    assert "modules run in mxfp8\n  mixer.in_proj: 656 rows % 32 = 16" in text


def test_fp32_is_called_fp32(capsys):
    text = tiny(capsys, "precision=nvfp4", "precision.params_dtype=fp32")
    assert "bf16" not in text.partition("\nmodule")[2] and "fp32     fp32       fp32" in text


def test_sizes_that_do_not_divide_are_shown_and_fail(capsys):
    text = explained(
        capsys,
        "experiment=tiny",
        "precision=nvfp4",
        "model.mamba_num_heads=8",
        "model.mamba_head_dim=32",
        code=1,
    )
    rows = [line for line in text.splitlines() if line.startswith("mixer.in_proj")]
    assert "648 rows % 16 = 8" in rows[0] and " ok " in rows[1]


def test_command():
    done = subprocess.run(
        [sys.executable, "-m", "precision.explain", "experiment=tiny", "precision=bf16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny in precision bf16")


def test_command_explains_a_mistake():
    arguments = ["experiment=tiny", "precision.rules=[{module: 'mixer.*'}]"]
    done = subprocess.run(
        [sys.executable, "-m", "precision.explain", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "ConfigError: precision.rules leaves decoder.layers.1.mlp.fc1_latent_proj without a "
        "format; end the list with a rule for everything else, such as {format: bf16}\n"
    )
