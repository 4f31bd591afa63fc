"""config.json of a `nemotron_h` folder <-> the model group of a recipe.

What one side can say and the other cannot is refused with the reason. Fields that the model of
transformers 5.23 does not read (`expand`, `n_shared_experts`, `sliding_window`, ...) are not
read here either.
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from model.conversion.table import mtp_blocks
from model.pattern import parse_pattern
from model.validate import validate_model
from recipes.compose import choices
from recipes.errors import CheckpointError, ConfigError
from recipes.schema import ModelConfig

_SAME = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "ssm_state_size": "mamba_state_dim",
    "n_groups": "mamba_num_groups",
    "conv_kernel": "mamba_d_conv",
    "chunk_size": "mamba_chunk_size",
    "layer_norm_epsilon": "layernorm_epsilon",
}
"""Fields every model has: Hugging Face's name -> ours."""

_OF_LAYERS = {
    "-": {"intermediate_size": "ffn_hidden_size"},
    "E": {
        "n_routed_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
        "routed_scaling_factor": "moe_router_topk_scaling_factor",
    },
}
"""Fields that only models with such layers need."""

_OPTIONAL = {
    "moe_latent_size": "moe_latent_size",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
}

_FRACTIONS = ("layer_norm_epsilon", "routed_scaling_factor", "attention_dropout", "hidden_dropout")
"""Fields that need not be whole numbers."""

_ALIASES = {
    "attention_head_dim": "head_dim",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_limit": "time_step_limit",
}
"""Other names of fields, in folders that other programs or older versions wrote."""

_MUST_BE: dict[str, tuple[Any, str]] = {
    "model_type": ("nemotron_h", "another architecture"),
    "norm_topk_prob": (True, "Megatron always normalises the weights of the chosen experts"),
    "mlp_hidden_act": ("relu2", "experts and MLPs here have squared ReLU"),
    "mamba_hidden_act": ("silu", "the convolution of Mamba here has SiLU"),
    "use_bias": (False, "Mamba projections here have no bias"),
    "mlp_bias": (False, "experts and MLPs here have no bias"),
    "attention_bias": (False, "attention here has no bias"),
    "use_conv_bias": (True, "the convolution of Mamba always has a bias here"),
    "tie_word_embeddings": (False, "embedding and output head are two matrices here"),
}
"""Field -> the only value that can be expressed, and why. Absent fields have it in transformers."""

_SYMBOLS = {
    "M": ("mamba", "linear_attention"),
    "*": ("attention", "full_attention"),
    "E": ("moe",),
    "-": ("mlp",),
}
"""Layer symbol -> Hugging Face's names of it; the first, which older readers know, is written."""


def read_model_config(folder: Path) -> ModelConfig:
    """The model group of a recipe, from a folder's config.json.

    Raises:
        CheckpointError: there is no config.json, a field is missing, or the model cannot be
            expressed in Megatron.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}; give a Hugging Face nemotron_h folder") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no fields; give a Hugging Face nemotron_h folder")
    _resolve_aliases(file, config)
    for name, (value, why) in _MUST_BE.items():
        found = config.get(name, value if name != "model_type" else None)
        if (found or False) != value:  # null is as good as false
            _refuse(file, name, config.get(name), why, f"only {json.dumps(value)} can be converted")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{file}: quantised weights cannot be converted; give plain ones")
    _check_time_step(file, config)
    main = _pattern(file, config, "layers_block_type", "hybrid_override_pattern")
    if main is None:
        raise CheckpointError(f"{file} has neither layers_block_type nor hybrid_override_pattern")
    if config.get("num_hidden_layers") not in (None, len(main)):
        raise CheckpointError(
            f"{file}: num_hidden_layers={json.dumps(config['num_hidden_layers'])}, but there are "
            f"{len(main)} layers in {main}; correct one of them"
        )
    physical = _number(file, config, "num_nextn_predict_layers") or 0
    mtp = ""
    if physical:
        mtp = _pattern(file, config, "mtp_layers_block_type", "mtp_hybrid_override_pattern") or "*E"
    repeated = bool(config.get("mtp_use_repeated_layer", physical <= 1))
    depths = physical
    if physical and repeated:
        depths = _number(file, config, "mtp_num_layers", least=1) or physical
    wanted = dict(_SAME)
    for symbol, names in _OF_LAYERS.items():
        if symbol in main + mtp:
            wanted |= names
    missing = [name for name in wanted if config.get(name) is None]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}; add them")
    fields: dict[str, Any] = {ours: _number(file, config, name) for name, ours in wanted.items()}
    fields |= {
        ours: _number(file, config, n) for n, ours in _OPTIONAL.items() if config.get(n) is not None
    }
    if "E" in main + mtp:
        groups = _number(file, config, "n_group") or 1
        chosen = _number(file, config, "topk_group") or 1
        if groups != chosen:
            fields |= {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
    model = ModelConfig(
        name=_name(folder),
        hybrid_layer_pattern="/".join([main, *[mtp] * depths]),
        mtp_use_repeated_layer=repeated,
        fp32_residual_connection=bool(config.get("residual_in_fp32")),
        **fields,
    )
    try:
        check_expressible(model, str(file))
        validate_model(model)
    except ConfigError as error:
        raise CheckpointError(f"{file} describes a model that cannot be built: {error}") from error
    return model


def config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json for a model.

    Written for old readers as well as new ones: the pattern as a string and as a list, with the
    older names of layers, and without `time_step_limit`, whose infinity some cannot read.

    Args:
        model: a valid model that `check_expressible` accepts.
        dtype: torch's name of the dtype of the weights, such as bfloat16.
    """
    pattern = parse_pattern(model.hybrid_layer_pattern)
    symbols = pattern.main + pattern.mtp
    config: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": dtype,
        "torch_dtype": dtype,
        "num_hidden_layers": pattern.num_layers,
        "hybrid_override_pattern": pattern.main,
        "layers_block_type": [_SYMBOLS[s][0] for s in pattern.main],
    }
    config |= {name: getattr(model, ours) for name, ours in _SAME.items()}
    for symbol, names in _OF_LAYERS.items():
        if symbol in symbols:
            config |= {name: getattr(model, ours) for name, ours in names.items()}
    # Readers other than transformers want it of every model; released ones repeat this width.
    config.setdefault("intermediate_size", model.moe_ffn_hidden_size or model.hidden_size)
    if "E" in symbols:
        groups, chosen = _groups(model)
        config |= {
            "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
            "moe_latent_size": model.moe_latent_size,
            "n_shared_experts": 1,
            "n_group": groups,
            "topk_group": chosen,
            "moe_shared_expert_overlap": False,
        }
    config |= {name: value for name, (value, _) in _MUST_BE.items()}
    inner = model.mamba_num_heads * model.mamba_head_dim
    config |= {
        # llama.cpp knows layer_norm_epsilon by these names alone.
        "norm_eps": model.layernorm_epsilon,
        "rms_norm_eps": model.layernorm_epsilon,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "expand": max(1, round(inner / model.hidden_size)),
        "mamba_proj_bias": False,
        # transformers 5.23 clamps dt here, which the model must not: as good as nothing. Zero
        # cannot be: its logarithm is taken.
        "time_step_min": 1e-30,
        # vLLM keeps states in 16 bits where this is not said.
        "mamba_ssm_cache_dtype": "float32",
        "residual_in_fp32": model.fp32_residual_connection,
        "use_cache": True,
        "num_nextn_predict_layers": mtp_blocks(model),
    }
    if pattern.mtp:
        config |= {
            "mtp_hybrid_override_pattern": pattern.mtp,
            "mtp_layers_block_type": [_SYMBOLS[s][0] for s in pattern.mtp],
            # Megatron's names, for the way back: how often the block is used in training.
            "mtp_use_repeated_layer": model.mtp_use_repeated_layer,
            "mtp_num_layers": pattern.mtp_depths,
        }
    return config


def check_expressible(model: ModelConfig, where: str) -> None:
    """Refuse models that Hugging Face's Nemotron-H computes otherwise than Megatron.

    Raises:
        CheckpointError: with the reason.
    """

    def refuse(key: str, why: str) -> NoReturn:
        value = getattr(model, key)
        shown = json.dumps(value)
        raise CheckpointError(f"{where}: {key}={shown} cannot be converted: {why}")

    pattern = parse_pattern(model.hybrid_layer_pattern)
    symbols = pattern.main + pattern.mtp
    if "M" in symbols and model.layernorm_epsilon != 1e-5:
        refuse(
            "layernorm_epsilon",
            "the gated norm of Mamba has 1e-5 in Megatron and this value in Hugging Face's model",
        )
    if "E" not in symbols:
        return
    if model.moe_router_topk == 1:
        refuse(
            "moe_router_topk",
            "with one expert a token Hugging Face normalises its weight to 1 and Megatron does not",
        )
    if model.moe_router_score_function != "sigmoid":
        refuse("moe_router_score_function", "Hugging Face's router has sigmoid scores")
    if not model.moe_router_enable_expert_bias:
        refuse("moe_router_enable_expert_bias", "Hugging Face's router always has the bias")
    if model.moe_shared_expert_intermediate_size is None:
        refuse(
            "moe_shared_expert_intermediate_size",
            "Hugging Face's MoE layers always have a shared expert",
        )
    if model.moe_router_dtype != "fp32":
        refuse("moe_router_dtype", "Hugging Face's router computes in FP32")
    groups, chosen = _groups(model)
    if groups > 1 and model.moe_router_topk // chosen != 2:
        refuse(
            "moe_router_num_groups",
            "Hugging Face rates a group by its best 2 experts, Megatron by its best "
            f"moe_router_topk / moe_router_group_topk = {model.moe_router_topk // chosen}",
        )


def _groups(model: ModelConfig) -> tuple[int, int]:
    """Router groups, and how many of them a token may use; all of them are as good as one."""
    groups, chosen = model.moe_router_num_groups or 1, model.moe_router_group_topk or 1
    return (1, 1) if groups == chosen else (groups, chosen)


def _refuse(file: Path, name: str, value: Any, why: str, remedy: str) -> NoReturn:
    raise CheckpointError(
        f"{file}: {name}={json.dumps(value)} cannot be converted: {why}; {remedy}"
    )


def _resolve_aliases(file: Path, config: dict[str, Any]) -> None:
    """Give each field its usual name."""
    for alias, name in _ALIASES.items():
        value = config.get(alias)
        if value is None:
            continue
        if config.get(name, value) not in (None, value):
            _refuse(file, alias, value, f"{name} is another", "correct one of them")
        config[name] = value
    if config.get("layers_block_type") is None:
        config["layers_block_type"] = config.get("layer_types")
    if config.get("num_key_value_heads", 0) is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")


def _check_time_step(file: Path, config: dict[str, Any]) -> None:
    """Megatron does not clamp dt, so a limit that does cannot be expressed."""
    limit = config.get("time_step_limit")
    if limit is None:
        return
    try:
        low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    except (TypeError, ValueError, KeyError):
        _refuse(file, "time_step_limit", limit, "it is not two numbers", "only 0 to infinity")
    if low > 0 or not math.isinf(high):
        _refuse(file, "time_step_limit", limit, "Megatron does not clamp dt", "only 0 to infinity")


def _pattern(file: Path, config: dict[str, Any], list_key: str, text_key: str) -> str | None:
    """The layer symbols a config gives as a list of names, as a string, or both."""
    names, text = config.get(list_key), config.get(text_key)
    if text is not None and not (isinstance(text, str) and set(text) <= set(_SYMBOLS)):
        _refuse(file, text_key, text, "it is not made of " + ", ".join(_SYMBOLS), "write it so")
    if names is None:
        return text
    if not isinstance(names, list):
        _refuse(file, list_key, names, "it is not a list", "write the name of each layer")
    symbols = {name: symbol for symbol, known in _SYMBOLS.items() for name in known}
    unknown = sorted({str(n) for n in names if str(n) not in symbols})
    if unknown:
        raise CheckpointError(
            f"{file}: {list_key} has {', '.join(unknown)}; layers that can be converted are "
            + ", ".join(symbols)
        )
    result = "".join(symbols[str(n)] for n in names)
    if text is not None and text != result:
        raise CheckpointError(f"{file}: {text_key}={text} and {list_key} ({result}) differ")
    return result


def _number(file: Path, config: dict[str, Any], name: str, least: int = 0) -> Any:
    """A field that is a number, or null."""
    value = config.get(name)
    kinds = (int, float, type(None)) if name in _FRACTIONS else (int, type(None))
    if (
        isinstance(value, bool)
        or not isinstance(value, kinds)
        or (value is not None and value < least)
    ):
        kind = "number" if name in _FRACTIONS else "whole number"
        _refuse(file, name, value, f"it is not a {kind}", f"write one of {least} or more")
    return value


def _name(folder: Path) -> str:
    """A name for tables and recipe files, from the folder's: a word that an override can have as
    its value and no shipped recipe has."""
    text = folder.resolve().name.lower()
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in text).strip("_")
    if name[:1].isalpha() and name not in choices("model"):
        return name
    return f"imported_{name}".strip("_")
