"""Conversion, proved by logits: the same weights give the same numbers in Megatron and in
transformers, which runs in a process of its own, and come back bit for bit."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.conversion import to_hf as to_hf_module
from model.conversion.common import saved_model, write_model
from model.conversion.config import read_model_config
from model.conversion.from_hf import from_hf
from model.conversion.safetensors_files import INDEX, SafetensorsReader, write_file
from model.conversion.table import LAYERS, Spec, pairs
from model.conversion.to_hf import to_hf
from model.conversion.torch_dist import TorchDistReader, saved_recipe
from model.pattern import parse_pattern
from recipes.compose import load_recipe
from recipes.errors import CheckpointError, ConfigError
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
    "wide heads": {"hybrid_layer_pattern": "M*E", "num_attention_heads": 6, "kv_channels": 24},
    "two router groups": {
        "hybrid_layer_pattern": "MEE",
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
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
    },
    "full width, in groups": {
        "hybrid_override_pattern": "M*EE",
        "n_group": 2,
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
    """Those that mlx-lm and vLLM have no default for, or another one than transformers."""
    for name in CONFIGURATIONS:
        config = json.loads((exported[name]["hf"] / "config.json").read_text())
        assert config["intermediate_size"] > 0, name
        assert config["mamba_ssm_cache_dtype"] == "float32", name


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


def tensors_equal(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


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


@pytest.fixture
def small(exported: dict[str, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of an exported folder in one file."""
    to_hf(options(exported["all kinds, repeated MTP"]["native"], tmp_path / "small"))
    return tmp_path / "small"


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_topk_prob": False}, "always normalises"),
        ({"num_experts_per_tok": 1}, "with one expert a token"),
        ({"n_group": 4, "topk_group": 1}, "best 2 experts"),
        ({"layer_norm_epsilon": 1e-6}, "the gated norm of Mamba"),
        ({"time_step_limit": [0.01, 1.0]}, "does not clamp dt"),
        ({"model_type": "llama"}, "another architecture"),
        ({"mlp_hidden_act": "silu"}, "squared ReLU"),
        ({"use_bias": True}, "no bias"),
        ({"use_conv_bias": False}, "always has a bias"),
        ({"tie_word_embeddings": True}, "two matrices"),
        ({"layers_block_type": ["mamba", "swa"]}, "layers_block_type has swa"),
        ({"head_dim": None}, "lacks head_dim"),
        ({"hidden_size": 64}, "of another shape"),
        ({"num_nextn_predict_layers": 2, "mtp_use_repeated_layer": False}, "missing: mtp.layers.2"),
        ({"num_nextn_predict_layers": 0}, "not in the model: mtp.layers"),
        ({"num_hidden_layers": 4}, "num_hidden_layers=4, but there are 6 layers in MEM.E-"),
        ({"hybrid_override_pattern": "ME|M*E-"}, "is not made of M, *"),
        ({"layers_block_type": 6}, "layers_block_type=6 .* it is not a list"),
        ({"hidden_size": "48"}, 'hidden_size="48" .* not a whole number'),
        ({"layer_norm_epsilon": "1e-5"}, "it is not a number"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
        ({"mtp_num_layers": 0}, "write one of 1 or more"),
        ({"time_step_limit": [0.0]}, "not two numbers"),
        ({"n_group": 4}, "best 2 experts"),
        ({"quantization_config": {}}, "quantised weights"),
    ],
)
def test_what_megatron_cannot_express_is_refused(
    small: Path, tmp_path: Path, changes: dict[str, Any], reason: str
):
    edit(small, **changes)
    with pytest.raises(CheckpointError, match=reason):
        from_hf(options(small, tmp_path / "native"), print)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"moe_router_topk": 1}, "with one expert a token"),
        ({"moe_router_score_function": "softmax"}, "sigmoid scores"),
        ({"moe_router_enable_expert_bias": False}, "always has the bias"),
        ({"layernorm_epsilon": 1e-6}, "the gated norm of Mamba"),
        ({"moe_shared_expert_intermediate_size": None}, "always have a shared expert"),
        ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "best 2 experts"),
        ({"hybrid_layer_pattern": "MEM*E-M/*E/*E"}, "missing: decoder.layers.6"),
        ({"vocab_size": 100}, "of another shape: embedding"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(
    exported: dict[str, dict[str, Any]], tmp_path: Path, changes: dict[str, Any], reason: str
):
    native = tmp_path / "native"
    shutil.copytree(exported["all kinds, repeated MTP"]["native"], native)
    recipe = json.loads((native / "config.json").read_text())
    recipe["model"] |= changes
    (native / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match=reason):
        to_hf(options(native, tmp_path / "hf"))


def test_a_damaged_description_is_refused_by_name(
    exported: dict[str, dict[str, Any]], tmp_path: Path
):
    native = tmp_path / "native"
    shutil.copytree(exported["experts at full width"]["native"], native)
    file = native / "config.json"
    good = json.loads(file.read_text())["model"]
    for text, reason in (
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds no recipe with a model"),
        ('{"model": null}', "config.json holds no recipe with a model"),
        (json.dumps({"model": good | {"hidden_size": None}}), "is no model: Incompatible value"),
        (json.dumps({"model": good | {"mamba_num_groups": 3}}), "mamba_num_groups=3 does not"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            to_hf(options(native, tmp_path / "hf"))
    file.write_text(json.dumps({"model": good}))
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer.json"):
        to_hf(options(native, tmp_path / "hf", tokenizer=str(tmp_path / "tokenizer")))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json is not valid JSON"):
        to_hf(options(native, tmp_path / "hf", tokenizer=str(tmp_path / "tokenizer")))


def test_each_tensor_is_used_once(small: Path, tmp_path: Path):
    file = small / "model.safetensors"
    whole = load_file(file)
    left_out = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != left_out}, file)
    with pytest.raises(CheckpointError, match=f"1 missing: {left_out}"):
        from_hf(options(small, tmp_path / "native"), print)
    save_file(whole | {"backbone.layers.1.mixer.surplus": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="1 not in the model: backbone.layers.1.mixer.surp"):
        from_hf(options(small, tmp_path / "native"), print)
    twice = {"model.embeddings.weight": whole["backbone.embeddings.weight"].clone()}
    save_file(whole | twice, file)
    with pytest.raises(CheckpointError, match="1 not in the model: .*embeddings.weight"):
        from_hf(options(small, tmp_path / "native"), print)


def test_weights_of_several_dtypes_keep_every_bit(small: Path, tmp_path: Path):
    """What one tensor of Megatron's is made of has the widest of their dtypes there."""
    whole = load_file(small / "model.safetensors")
    narrow = {k: v.bfloat16() for k, v in whole.items() if "q_proj" in k or "experts.0." in k}
    save_file(whole | narrow, small / "model.safetensors")
    from_hf(options(small, tmp_path / "native"), print)
    to_hf(options(tmp_path / "native", tmp_path / "hf"))
    back = tensors(tmp_path / "hf")
    assert all(torch.equal(back[k], v.to(back[k].dtype)) for k, v in (whole | narrow).items())
    with fresh_world():
        load(build(model_of(CONFIGURATIONS["all kinds, repeated MTP"])), tmp_path / "native")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file[:-1], "bytes, not"),
        (lambda file: file[:5], "cannot be read"),
        (lambda file: file[:7] + b"\x7f" + file[8:], "cannot be read"),
        (lambda file: file.replace(b'"F32"', b'"F64"'), "is F64; .* F32, BF16, F16$"),
        (lambda file: file.replace(b'"dtype"', b'"dtipe"'), "KeyError: 'dtype'"),
        (lambda file: file.replace(b"[2,3]", b"[2,x]"), "cannot be read"),
        (lambda file: file.replace(b"[2,3]", b"[2,4]"), "does not fit its shape"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
):
    file = tmp_path / "model.safetensors"
    write_file(file, [("x", torch.float32, (2, 3))], [torch.ones(2, 3)])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{file}.*{reason}"):
        SafetensorsReader(tmp_path)


def test_a_damaged_index_is_refused(tmp_path: Path):
    for text in ("[]", "{}", '{"weight_map": []}', "{"):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=f"{INDEX} cannot be read"):
            SafetensorsReader(tmp_path)
    write_file(tmp_path / "model.safetensors", [], [])
    with pytest.raises(CheckpointError, match="has both"):
        SafetensorsReader(tmp_path)


def test_what_the_file_system_refuses_is_one_sentence(small: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: Not a directory"):
        from_hf(options(small, tmp_path / "file"), print)
    from_hf(options(small, tmp_path / "native"), print)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as full a disk as any
        with pytest.raises(CheckpointError, match="^writing failed"):
            from_hf(options(small, tmp_path / "second"), print)
        with pytest.raises(CheckpointError, match="^writing failed: File too large"):
            to_hf(options(tmp_path / "native", tmp_path / "hf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    from_hf(options(small, tmp_path / "second"), print)
    to_hf(options(tmp_path / "native", tmp_path / "hf"))
    assert tensors_equal(tmp_path / "hf", small)


def test_other_names_that_transformers_wrote_are_read(small: Path, tmp_path: Path):
    from_hf(options(small, tmp_path / "plain"), print)
    whole = load_file(small / "model.safetensors")
    renamed: dict[str, Tensor] = {}
    stacked: set[str] = set()
    for name, value in whole.items():
        name = name.replace("backbone.", "model.").replace("embeddings.", "embedding.")
        before, found, after = name.partition(".experts.")
        if found:
            stacked.add(f"{before}.experts.{after.split('.')[1]}")
        else:
            renamed[name] = value
    renamed |= {k: torch.stack(_in_order(whole, k)) for k in stacked}
    save_file(renamed, small / "model.safetensors")
    from_hf(options(small, tmp_path / "renamed"), print)
    first, second = TorchDistReader(tmp_path / "plain"), TorchDistReader(tmp_path / "renamed")
    assert first.shapes == second.shapes
    for name, shape in first.shapes.items():
        assert torch.equal(first.read(Spec(name, shape)), second.read(Spec(name, shape))), name


def _in_order(whole: dict[str, Tensor], stacked: str) -> list[Tensor]:
    """The experts of a stacked tensor's name, by number."""
    prefix, kind = stacked.replace("model.", "backbone.", 1).rsplit(".", 1)
    return [whole[f"{prefix}.{i}.{kind}.weight"] for i in range(8)]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused_by_name(
    exported: dict[str, dict[str, Any]], tmp_path: Path, damage: str
):
    native = tmp_path / "native"
    shutil.copytree(exported["experts at full width"]["native"], native)
    file = next(native.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    if damage == "gone":
        file.unlink()
    with pytest.raises(CheckpointError, match=re.escape(file.name)):
        to_hf(options(native, tmp_path / "hf"))


def test_a_killed_conversion_goes_on_where_it_was(
    exported: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Fails in the third file of several; the second try writes only what is left."""
    case = exported["all kinds, repeated MTP"]
    wanted = options(case["native"], tmp_path / "hf", shard_gigabytes=1e-4, workers=1)
    real, written = to_hf_module.write_file, list[str]()

    def write(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise OSError("no more")
        real(path, *rest)
        written.append(path.name)

    monkeypatch.setattr(to_hf_module, "write_file", write)
    with pytest.raises(CheckpointError, match="no more"):
        to_hf(wanted)
    assert not (tmp_path / "hf" / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished work of another command"):
        to_hf(options(case["native"], tmp_path / "hf", shard_gigabytes=2e-4))
    first = list(written)
    written[:] = ["", "", ""]
    to_hf(wanted)
    assert len(written) > 4 and not set(first) & set(written)
    monkeypatch.undo()
    to_hf(options(case["native"], tmp_path / "straight", shard_gigabytes=1e-4))
    assert tensors_equal(tmp_path / "hf", tmp_path / "straight")
    with pytest.raises(CheckpointError, match="is not empty"):
        to_hf(wanted)


def test_an_imported_model_has_a_name_one_can_choose(
    exported: dict[str, dict[str, Any]], tmp_path: Path
):
    config = exported["Mamba alone, one group"]["hf"] / "config.json"
    for folder, name in (
        ("Super-v1.5", "super_v1_5"),
        ("tiny", "imported_tiny"),
        ("123", "imported_123"),
        ("größe", "gr__e"),
        ("--", "imported"),
    ):
        (tmp_path / folder).mkdir()
        shutil.copyfile(config, tmp_path / folder / "config.json")
        model = read_model_config(tmp_path / folder)
        assert model.name == name
    recipes = write_model(model, tmp_path)
    assert load_recipe(["experiment=tiny", f"model={name}"], recipes).model.name == name


def test_options_are_checked(tmp_path: Path):
    with pytest.raises(ConfigError, match="convert.workers=0"):
        to_hf(options(tmp_path, tmp_path / "hf", workers=0))
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        to_hf(options(tmp_path, tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="give a Hugging Face nemotron_h folder"):
        from_hf(options(tmp_path, tmp_path / "native"), print)
