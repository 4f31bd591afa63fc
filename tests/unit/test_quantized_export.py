"""NVFP4 weights of an export, against the definition of the format and against modelopt itself."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.conversion.common import saved_model
from model.conversion.from_hf import from_hf
from model.conversion.quantized import Quantizer, _module, pack
from model.conversion.table import pairs
from model.conversion.to_hf import to_hf
from model.conversion.torch_dist import saved_recipe
from recipes.errors import ConfigError
from tests.unit.conversion import build, model_of, options, save, scramble, tensors
from tests.unit.oracles import run, unpacked
from tests.unit.world import fresh_world

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
"""E2M1 by code, written out."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, its export, and its export with the weights of the policy nvfp4."""
    folder = tmp_path_factory.mktemp("quantized")
    sizes: dict[str, Any] = {"hybrid_layer_pattern": "MEMEM*EME/*E", "hidden_size": 64}
    sizes |= {"mamba_num_heads": 16, "mamba_head_dim": 16, "mamba_num_groups": 2}
    sizes |= {"moe_ffn_hidden_size": 32, "moe_latent_size": 32, "mamba_state_dim": 16}
    sizes |= {"moe_shared_expert_intermediate_size": 64}
    with fresh_world():
        model = model_of(sizes)
        network = build(model)
        scramble(network, seed=3)
        save(network, folder / "native", model)
    to_hf(options(folder / "native", folder / "plain"))
    to_hf(options(folder / "native", folder / "nvfp4", quantize="nvfp4", shard_gigabytes=0.0002))
    return folder / "native", folder / "plain", folder / "nvfp4"


def values_of(packed: Tensor) -> Tensor:
    """E2M1 values of bytes, the low nibble first."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    return VALUES[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)


def test_each_weight_is_the_nearest_the_format_has(exported: tuple[Path, Path, Path]) -> None:
    plain, packed = tensors(exported[1]), tensors(exported[2])
    names = [name.removesuffix("_scale") for name in packed if name.endswith("weight_scale")]
    assert len(names) > 30
    for name in names:
        x = plain[name].double()
        scale, whole = packed[f"{name}_scale"], packed[f"{name}_scale_2"]
        assert packed[name].dtype == torch.uint8 and scale.dtype == torch.float8_e4m3fn
        assert whole.dtype == torch.float32 and whole.shape == ()
        blocks = x.view(x.shape[0], -1, 16)
        torch.testing.assert_close(whole.double(), x.abs().max() / (6 * 448), rtol=1e-6, atol=0)
        largest = (blocks.abs().amax(-1) / 6 / whole.double()).float()
        # Of a quotient that lies half way between two scales, rounding decides.
        apart = (largest.to(torch.float8_e4m3fn).float() / scale.float()).log2().abs()
        assert (apart == 0).float().mean() > 0.99 and apart.max() < 0.2
        step = scale.double()[..., None] * whole.double()
        found = values_of(packed[name]).view_as(blocks) * step
        choices = torch.cat([VALUES, -VALUES]) * step[..., None]
        best = (choices - blocks[..., None]).abs().amin(-1)
        torch.testing.assert_close((found - blocks).abs(), best, rtol=1e-5, atol=1e-9)


def test_what_the_policy_does_not_quantise_is_as_it_was(exported: tuple[Path, Path, Path]) -> None:
    plain, packed = tensors(exported[1]), tensors(exported[2])
    kept = [name for name in plain if f"{name}_scale" not in packed]
    assert all(torch.equal(plain[name], packed[name]) for name in kept)
    assert set(packed) == {
        f"{name}{suffix}"
        for name in plain
        for suffix in (("",) if name in kept else ("", "_scale", "_scale_2"))
    }
    quantised = {name for name in plain if name not in kept}
    # The published policy: Mamba's input projections and experts, but not the last 15 % of layers.
    assert "backbone.layers.0.mixer.in_proj.weight" in quantised
    assert "backbone.layers.1.mixer.experts.3.up_proj.weight" in quantised
    for name in (
        "0.mixer.out_proj",
        "5.mixer.q_proj",
        "1.mixer.fc1_latent_proj",
        "7.mixer.in_proj",
    ):
        assert f"backbone.layers.{name}.weight" in kept
    assert not any(name.startswith(("mtp.", "lm_head", "backbone.emb")) for name in quantised)
    said = json.loads((exported[2] / "config.json").read_text())["quantization_config"]
    own = json.loads((exported[2] / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_method"] == "modelopt" and said["quant_algo"] == "W4A16_NVFP4"
    assert own["quant_algo"] == "W4A16_NVFP4" and own["group_size"] == 16
    assert said["ignore"] == own["exclude_modules"]
    assert {"lm_head", "backbone.layers.0.mixer.out_proj"} <= set(said["ignore"])
    # Readers match a module, the experts of a layer being one, with the patterns of `ignore`.
    for name, value in plain.items():
        if value.dim() >= 2 and "embeddings" not in name:
            module = re.sub(r"experts\.\d+\..*", "experts", name.removesuffix(".weight"))
            ignored = any(fnmatch(module, pattern) for pattern in said["ignore"])
            assert ignored == (name not in quantised), name
    index = json.loads((exported[2] / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(packed)


def hard() -> Tensor:
    """BF16, where quotients half way between two scales are common, with blocks of zeros and blocks
    that are tiny beside the tensor's largest number."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    x[3], x[5, 16:32] = 0, 0
    x[6] *= 1e-6
    x[7] *= 1e-5
    return x.bfloat16()


def test_tiny_blocks_keep_what_the_smallest_scale_can_say() -> None:
    x = hard()
    codes, scale, whole = pack(x)
    assert (scale[6].float() == 2.0**-9).all() and (scale[3].float() == 1).all()
    step = scale[6].double().repeat_interleave(16) * whole.double()
    best = (torch.cat([VALUES, -VALUES]) * step[:, None] - x[6].double()[:, None]).abs().amin(-1)
    found = values_of(codes[6]) * step
    torch.testing.assert_close((found - x[6].double()).abs(), best, rtol=1e-5, atol=0)
    assert found.any() and not codes[3].any()
    zeros = pack(torch.zeros(2, 16))
    assert not zeros[0].any() and zeros[1].float().isfinite().all()


def calibration(file: Path, native: Path, **changes: Any) -> str:
    """As `python -m train.calibrate` writes it, with numbers of ours."""
    model = saved_model(native, saved_recipe(native))
    modules = sorted(Quantizer("nvfp4", model)._modules)
    activations = {name: 0.5 + i for i, name in enumerate(modules)} | changes.pop("activations", {})
    file.write_text(json.dumps({"policy": "nvfp4", "activations": activations} | changes))
    return str(file)


@pytest.mark.slow
def test_modelopt_writes_the_same_bytes(exported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Codes, both scales of the weights and that of the activations, and what is hard to round."""
    native, plain, _ = exported
    file = calibration(tmp_path / "c.json", native)
    to_hf(options(native, tmp_path / "both", quantize="nvfp4", calibration=file))
    before, after = tensors(plain), tensors(tmp_path / "both")
    largest = json.loads(Path(file).read_text())["activations"]
    model = saved_model(native, saved_recipe(native))
    covered = filter(Quantizer("nvfp4", model).covers, pairs(model))
    modules = {
        spec.name.removesuffix(".weight"): largest[_module(pair)]
        for pair in covered
        for spec in pair.hf
    }
    assert len(modules) > 30
    parts = zip(("weight", "weight_scale", "weight_scale_2"), pack(hard()), strict=True)
    after |= {f"hard.{part}": value for part, value in parts}
    after["hard.input_scale"] = torch.tensor(5 / 2688)
    save_file(before | {"hard.weight": hard()}, tmp_path / "plain.safetensors")
    save_file(after, tmp_path / "quantised.safetensors")
    wheels = ("nvidia-modelopt==0.47.0", "pulp==3.3.0", "nvidia-ml-py==13.615.71", "scipy==1.18.1")
    task = {
        "wheels": [str(unpacked(wheel, "modelopt or what it imports")) for wheel in wheels],
        "plain": str(tmp_path / "plain.safetensors"),
        "quantised": str(tmp_path / "quantised.safetensors"),
        "largest": modules | {"hard": 5.0},
    }
    (tmp_path / "modelopt.json").write_text(json.dumps(task))
    agree = f"{len(modules) + 1} modules agree"
    assert agree in run("tests.unit.modelopt_reference", tmp_path)


def test_a_calibration_adds_scales_of_activations(
    exported: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    native, _, weights = exported
    layer = "decoder.layers.1.mlp.experts.linear_fc1"
    own = {layer: 8.0, "decoder.layers.0.mixer.in_proj": 2688.0}
    file = calibration(tmp_path / "c.json", native, activations=own)
    to_hf(options(native, tmp_path / "both", quantize="nvfp4", calibration=file))
    before, after = tensors(weights), tensors(tmp_path / "both")
    for name, value in before.items():
        bits = (t.reshape(-1).view(torch.uint8) for t in (after[name], value))
        assert torch.equal(*bits), name
    scales = {n: v for n, v in after.items() if n not in before}
    packed = {n.removesuffix(".weight_scale") for n in before if n.endswith(".weight_scale")}
    assert {n.removesuffix(".input_scale") for n in scales} == packed
    assert all(v.dtype == torch.float32 and v.shape == () and v > 0 for v in scales.values())
    assert scales["backbone.layers.0.mixer.in_proj.input_scale"] == 1
    for expert in (0, 3):  # 8 of the 2,688 = 6 * 448 that a scaled block reaches
        name = f"backbone.layers.1.mixer.experts.{expert}.up_proj.input_scale"
        assert scales[name].item() == pytest.approx(0.00297619, rel=1e-5)
    said = json.loads((tmp_path / "both/config.json").read_text())["quantization_config"]
    own_file = json.loads((tmp_path / "both/hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == own_file["quant_algo"] == "NVFP4"
    group = said["config_groups"]["group_0"]
    assert group["input_activations"] == group["weights"] and group["weights"]["num_bits"] == 4


def test_a_calibration_of_something_else_is_refused(
    exported: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    native, plain, _ = exported
    good = calibration(tmp_path / "good.json", native)
    (tmp_path / "broken.json").write_text("{")
    in_proj = "decoder.layers.0.mixer.in_proj"
    for words, message in (
        ({"calibration": good}, "scales what is quantised, and nothing is; set convert.quantize"),
        ({"calibration": str(tmp_path / "no.json")}, "cannot be read: No such file"),
        ({"calibration": str(tmp_path / "broken.json")}, "is no calibration"),
        (
            {"calibration": calibration(tmp_path / "1.json", native, policy="nvfp4_all")},
            "is of the policy nvfp4_all, not nvfp4; write it with python -m train.calibrate",
        ),
        (
            {"calibration": calibration(tmp_path / "2.json", native, activations={"x": 1.0})},
            "is of another model: they differ in x;",
        ),
        (
            {"calibration": calibration(tmp_path / "3.json", native, activations={in_proj: 0.0})},
            f"has no scale for {in_proj}",
        ),
    ):
        quantize = {} if "nothing is" in message else {"quantize": "nvfp4"}
        with pytest.raises(ConfigError, match=re.escape(message)):
            to_hf(options(native, tmp_path / "x", **quantize, **words))
    with pytest.raises(ConfigError, match="convert.calibration=.* is for to_hf"):
        from_hf(options(plain, tmp_path / "y", calibration=good), print)


def test_a_policy_that_quantises_nothing_is_refused(
    exported: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    native, plain, _ = exported
    with pytest.raises(ConfigError, match="convert.quantize=bf16 has no module in nvfp4"):
        to_hf(options(native, tmp_path / "a", quantize="bf16"))
    with pytest.raises(ConfigError, match="convert.quantize=int4 is no precision policy; use"):
        to_hf(options(native, tmp_path / "b", quantize="int4"))
    with pytest.raises(ConfigError, match="convert.quantize=nvfp4 is for to_hf"):
        from_hf(options(plain, tmp_path / "c", quantize="nvfp4"), print)
