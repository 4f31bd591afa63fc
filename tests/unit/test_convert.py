"""Conversion, proved by logits: the same weights give the same numbers in Megatron and in
transformers, which runs in a process of its own, and come back bit for bit."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.conversion.common import saved_model
from model.conversion.from_hf import from_hf
from model.conversion.table import LAYERS, pairs
from model.conversion.to_hf import to_hf
from model.conversion.torch_dist import TorchDistReader, saved_recipe
from model.pattern import parse_pattern
from recipes.schema import ModelConfig
from tests.unit.conversion import (
    build,
    load,
    logits,
    model_of,
    options,
    save,
    scramble,
    tensors,
    tensors_equal,
    tokens_of,
)
from tests.unit.oracles import run, unpacked
from tests.unit.plain_model import run as run_plainly
from tests.unit.world import fresh_world

TOLERANCE = 1e-5
"""Relative error of the logits, in FP32."""
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "all kinds, repeated MTP": {"hybrid_layer_pattern": "MEM*E-/*E/*E"},
    "experts at full width": {"hybrid_layer_pattern": "ME*E", "moe_latent_size": None},
    "MTP blocks of their own": {
        "hybrid_layer_pattern": "M*E/*E/*E",
        "mtp_use_repeated_layer": False,
    },
    "MTP of three layers": {"hybrid_layer_pattern": "ME/M*E"},
    "MTP of one layer": {"hybrid_layer_pattern": "M*/E"},
    "Mamba alone, one group": {"hybrid_layer_pattern": "MMM", "mamba_num_groups": 1},
    "a group a head": {"hybrid_layer_pattern": "M*M", "mamba_num_groups": 8},
    "wide Mamba, short convolution": {
        "hybrid_layer_pattern": "MM-",
        "mamba_num_heads": 6,
        "mamba_head_dim": 20,
        "mamba_num_groups": 3,
        "mamba_d_conv": 3,
        "mamba_state_dim": 12,
    },
    "one key/value head": {"hybrid_layer_pattern": "**-", "num_query_groups": 1},
    "as many key/value heads as query heads": {
        "hybrid_layer_pattern": "*M*",
        "num_query_groups": 4,
        "kv_channels": 20,
    },
    "wide heads, residuals in FP32": {
        "hybrid_layer_pattern": "M*E",
        "num_attention_heads": 6,
        "kv_channels": 24,
        "fp32_residual_connection": True,
        "hidden_dropout": 0.1,
    },
    "two router groups": {
        "hybrid_layer_pattern": "MEE",
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
    "all router groups": {
        "hybrid_layer_pattern": "ME",
        "moe_router_topk": 6,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 2,
    },
    "many experts": {
        "hybrid_layer_pattern": "EME",
        "num_moe_experts": 32,
        "moe_router_topk": 11,
        "moe_router_topk_scaling_factor": None,
    },
    "chunk longer than the text": {"hybrid_layer_pattern": "M-M", "mamba_chunk_size": 64},
}
"""Every one is converted both ways and its logits compared."""


MADE = {
    "hidden_size": 48,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
    "routed_scaling_factor": 2.5,
}
MADE_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "latent, announcing MTP it does not have": {
        "hybrid_override_pattern": "MEM*E-",
        "moe_latent_size": 24,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
        "n_group": 2,
        "topk_group": 2,
    },
    "full width, in groups": {
        "hybrid_override_pattern": "M*EE",
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "conv_kernel": 2,
    },
    "BF16": {"hybrid_override_pattern": "ME*", "moe_latent_size": 16, "head_dim": 8},
}


def generated(network: torch.nn.Module, tokens: Tensor, count: int) -> Tensor:
    """Greedy continuation of the first 8 tokens, by whole forward passes."""
    text = tokens[:, :8]
    for _ in range(count):
        text = torch.cat([text, logits(network, text)[:, -1:].argmax(-1)], dim=1)
    return text


def drafted(network: Any, tokens: Tensor, model: ModelConfig) -> list[Tensor]:
    """What each depth of multi-token prediction says of one text, from Megatron's own block."""
    hidden = network.decoder(network.embedding(tokens[None], None), attention_mask=None)
    found = []
    for depth in range(parse_pattern(model.hybrid_layer_pattern).mtp_depths):
        hidden, ahead = hidden[:-1], tokens[None, depth + 1 :]
        block = network.mtp.layers[min(depth, len(network.mtp.layers) - 1)]
        positions = torch.arange(len(hidden))[None]
        hidden = block.forward_single_position(
            hidden, ahead, positions, embedding=network.embedding
        )
        found.append(network.output_layer(hidden)[0][:, 0])
    return found


def run_reference(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Let transformers do its part, in a process without stand-ins."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.hf_reference", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each configuration: saved by Megatron, converted, and run by transformers, which also makes
    models of its own."""
    root = tmp_path_factory.mktemp("exported")
    found: dict[str, dict[str, Any]] = {}
    jobs = []
    with fresh_world():
        for i, (name, fields) in enumerate(CONFIGURATIONS.items()):
            model = model_of(fields)
            native, folder = root / str(i) / "native", root / str(i) / "hf"
            network = build(model)
            scramble(network, seed=i)
            save(network, native, model)
            to_hf(options(native, folder, shard_gigabytes=1e-4 * (i % 3 + 0.3)))
            tokens = tokens_of(model)
            # transformers' cache wants an attention layer.
            generate = 6 if "*" in fields["hybrid_layer_pattern"].split("/")[0] else 0
            found[name] = {"model": model, "native": native, "hf": folder}
            found[name]["logits"] = logits(network, tokens)
            with torch.no_grad():
                found[name]["drafted"] = drafted(network, tokens[0], model)
            if generate:
                found[name]["generated"] = generated(network, tokens, generate)
            jobs.append({"folder": str(folder), "tokens": tokens.tolist(), "generate": generate})
    text = tokens_of(model_of({"hybrid_layer_pattern": "M"})).tolist()
    for name, fields in MADE_BY_TRANSFORMERS.items():
        folder = root / str(len(jobs)) / "hf"
        dtype = "bfloat16" if name == "BF16" else "float32"
        made = {"folder": str(folder), "make": MADE | fields, "dtype": dtype}
        jobs.append(made | {"tokens": text, "generate": 6})
        found[name] = {"hf": folder}
    run_reference(jobs, root)
    return found


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_megatron_and_transformers_agree(exported: dict[str, dict[str, Any]], name: str):
    case = exported[name]
    reference = torch.load(case["hf"] / "reference.pt")
    assert error(case["logits"], reference["logits"]) < TOLERANCE
    assert error(case["logits"], reference["stock"]) < TOLERANCE  # what we export is not clamped
    if "generated" in case:
        assert torch.equal(case["generated"], reference["generated"])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_plain_arithmetic_agrees(exported: dict[str, dict[str, Any]], name: str):
    """Multi-token prediction too, of which transformers has no model."""
    case = exported[name]
    main, drafts = run_plainly(case["hf"], tokens_of(case["model"])[0].tolist())
    for found, wanted in zip([case["logits"][0], *case["drafted"]], [main, *drafts], strict=True):
        assert error(found, torch.from_numpy(wanted)) < TOLERANCE


def test_readers_find_the_fields_they_need(exported: dict[str, dict[str, Any]]):
    """Those that mlx-lm, vLLM and llama.cpp have no default for, or another one than
    transformers."""
    for name in CONFIGURATIONS:
        config = json.loads((exported[name]["hf"] / "config.json").read_text())
        assert config["intermediate_size"] > 0, name
        assert config["mamba_ssm_cache_dtype"] == "float32", name
        assert config["norm_eps"] == config["rms_norm_eps"] == config["layer_norm_epsilon"], name


@pytest.mark.slow
def test_mlx_agrees(exported: dict[str, dict[str, Any]], tmp_path: Path):
    """A reader of exported folders that shares no code with transformers."""
    versions = ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2")
    wheels = [str(unpacked(wheel, "Apple's Nemotron-H")) for wheel in versions]
    jobs = [
        {"folder": str(exported[name]["hf"]), "tokens": tokens_of(exported[name]["model"]).tolist()}
        for name in CONFIGURATIONS
    ]
    (tmp_path / "mlx.json").write_text(json.dumps({"wheels": wheels, "jobs": jobs}))
    run("tests.unit.mlx_reference", tmp_path)
    for name in CONFIGURATIONS:
        found = torch.from_numpy(np.load(exported[name]["hf"] / "mlx.npy"))
        assert error(exported[name]["logits"], found) < TOLERANCE, name


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_way_back_is_bitwise(exported: dict[str, dict[str, Any]], name: str, tmp_path: Path):
    case = exported[name]
    from_hf(options(case["hf"], tmp_path / "native", shard_gigabytes=1e-4), print)
    old, new = TorchDistReader(case["native"]), TorchDistReader(tmp_path / "native")
    assert old.shapes == new.shapes
    for spec in {s.name: s for p in pairs(case["model"]) for s in p.native}.values():
        assert torch.equal(old.read(spec), new.read(spec)), spec
    to_hf(options(tmp_path / "native", tmp_path / "hf", shard_gigabytes=1e-4))
    assert tensors_equal(case["hf"], tmp_path / "hf")
    written = json.loads((tmp_path / "native" / "config.json").read_text())["model"]
    assert written | {"name": "probe"} == written_fields(case["model"])


def written_fields(model: ModelConfig) -> dict[str, Any]:
    """What of a model config.json says."""
    fields = asdict(model)
    if model.moe_router_topk_scaling_factor is None:
        fields["moe_router_topk_scaling_factor"] = 1.0
    if model.moe_router_num_groups == model.moe_router_group_topk:  # which choose nothing
        fields |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
    symbols = model.hybrid_layer_pattern
    for symbol, names in (
        ("-", ("ffn_hidden_size",)),
        (
            "E",
            (
                "num_moe_experts",
                "moe_ffn_hidden_size",
                "moe_shared_expert_intermediate_size",
                "moe_latent_size",
                "moe_router_topk_scaling_factor",
            ),
        ),
    ):
        if symbol not in symbols:
            fields |= dict.fromkeys(names)
    if "E" not in symbols:
        fields["moe_router_topk"] = ModelConfig.moe_router_topk
    return fields


@pytest.mark.parametrize("name", MADE_BY_TRANSFORMERS)
def test_what_transformers_makes_comes_in(
    exported: dict[str, dict[str, Any]], name: str, tmp_path: Path
):
    folder = exported[name]["hf"]
    said: list[str] = []
    from_hf(options(folder, tmp_path / "native"), said.append)
    assert len(said) == ("announcing" in name)
    model = saved_model(tmp_path / "native", saved_recipe(tmp_path / "native"))
    assert "/" not in model.hybrid_layer_pattern
    tokens = tokens_of(model)
    with fresh_world():
        network = build(model)
        load(network, tmp_path / "native")
        found, text = logits(network, tokens), generated(network, tokens, 6)
    reference = torch.load(folder / "reference.pt")
    assert error(found, reference["logits"]) < TOLERANCE
    assert torch.equal(text, reference["generated"])
    to_hf(options(tmp_path / "native", tmp_path / "hf"))
    before, after = tensors(folder), tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    widened = tuple(r.hf for r in LAYERS["M"] if r.fp32)
    for key, value in after.items():
        wide = key.endswith(widened)
        assert value.dtype == (torch.float32 if wide else before[key].dtype), key
        assert torch.equal(value, before[key].to(value.dtype)), key
