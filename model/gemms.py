"""The linear modules of a model that Transformer Engine can quantise, in plain Python.

tests/unit/test_policy.py holds the list against the modules of the real Megatron model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from model.counts import layer_flops
from model.pattern import parse_pattern
from precision.policy import Gemm, Policy, resolve
from recipes.schema import ModelConfig, ParallelConfig, Recipe
from recipes.validate import stage_tokens


@dataclass(frozen=True)
class _Linear:
    """A weight before it is placed in a layer: [rows, columns] over all ranks."""

    module: str
    rows: int
    columns: int
    split: str
    """What tensor parallelism splits: rows, columns or nothing."""
    copies: int = 1
    """Experts that have one each."""


def policy_of(recipe: Recipe) -> Policy:
    """The recipe's precision policy for the recipe's model.

    Raises:
        ConfigError: rules that do not fit the model (precision/policy.py).
    """
    return resolve(
        recipe.precision,
        model_gemms(recipe.model, recipe.parallel),
        parse_pattern(recipe.model.hybrid_layer_pattern).num_layers,
        stage_tokens(recipe.stage),
    )


def model_gemms(model: ModelConfig, parallel: ParallelConfig) -> tuple[Gemm, ...]:
    """All of them, decoder first, then multi-token prediction (MTP).

    Names are Megatron's, with global layer numbers: `decoder.layers.{i}.{module}`,
    `mtp.layers.{k}.eh_proj` and `mtp.layers.{k}.mtp_model_layer.layers.{j}.{module}`. A repeated
    MTP block is one module, and does the work of all depths.
    """
    pattern = parse_pattern(model.hybrid_layer_pattern)
    found: list[Gemm] = []
    for i, symbol in enumerate(pattern.main):
        found += _gemms(model, parallel, symbol, f"decoder.layers.{i}.", i, 1)
    blocks = 1 if model.mtp_use_repeated_layer else pattern.mtp_depths
    for k in range(blocks if pattern.mtp_depths else 0):
        times = pattern.mtp_depths // blocks
        d, tp = model.hidden_size, parallel.tensor_model_parallel_size
        found.append(
            Gemm(
                name=f"mtp.layers.{k}.eh_proj",
                layer=None,
                module="eh_proj",
                rows=d // tp,
                columns=2 * d,
                parameters=2 * d * d,
                flops=times * 4.0 * d * d,
            )
        )
        for j, symbol in enumerate(pattern.mtp):
            prefix = f"mtp.layers.{k}.mtp_model_layer.layers.{j}."
            found += _gemms(model, parallel, symbol, prefix, None, times)
    return tuple(found)


def _gemms(
    model: ModelConfig,
    parallel: ParallelConfig,
    symbol: str,
    prefix: str,
    layer: int | None,
    times: int,
) -> Iterator[Gemm]:
    """The modules of one layer that is applied `times` times."""
    costs = layer_flops(model, symbol, sequence_length=1)  # of products with weights: any length
    for linear in _linears(model, symbol):
        experts = linear.module.startswith("mlp.experts")
        ranks = (
            parallel.expert_tensor_parallel_size if experts else parallel.tensor_model_parallel_size
        )
        # model/counts.py gives both matrices of an expert in one number; they are equal.
        pair = linear.module.rpartition(".")[0]
        cost = costs.get(linear.module) or costs[pair] / 2
        yield Gemm(
            name=prefix + linear.module,
            layer=layer,
            module=linear.module,
            rows=linear.rows // (ranks if linear.split == "rows" else 1),
            columns=linear.columns // (ranks if linear.split == "columns" else 1),
            parameters=linear.copies * linear.rows * linear.columns,
            flops=times * cost,
        )


def _linears(model: ModelConfig, symbol: str) -> Iterator[_Linear]:
    """The weights of a layer; symbols as in model/counts.py."""
    d = model.hidden_size
    if symbol == "M":
        inner = model.mamba_num_heads * model.mamba_head_dim
        groups = model.mamba_num_groups * model.mamba_state_dim
        rows = 2 * inner + 2 * groups + model.mamba_num_heads
        yield _Linear("mixer.in_proj", rows, d, "rows")
        yield _Linear("mixer.out_proj", d, inner, "columns")
    elif symbol == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys = model.num_query_groups * model.kv_channels
        yield _Linear("self_attention.linear_qkv", queries + 2 * keys, d, "rows")
        yield _Linear("self_attention.linear_proj", d, queries, "columns")
    elif symbol == "-":
        assert model.ffn_hidden_size is not None
        yield _Linear("mlp.linear_fc1", model.ffn_hidden_size, d, "rows")
        yield _Linear("mlp.linear_fc2", d, model.ffn_hidden_size, "columns")
    else:
        yield from _moe(model)


def _moe(model: ModelConfig) -> Iterator[_Linear]:
    assert model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    d, inner, experts = model.hidden_size, model.moe_ffn_hidden_size, model.num_moe_experts
    width = model.moe_latent_size or d
    if model.moe_latent_size:
        yield _Linear("mlp.fc1_latent_proj", width, d, "nothing")
        yield _Linear("mlp.fc2_latent_proj", d, width, "nothing")
    yield _Linear("mlp.experts.linear_fc1", inner, width, "rows", experts)
    yield _Linear("mlp.experts.linear_fc2", width, inner, "columns", experts)
    if shared := model.moe_shared_expert_intermediate_size:
        yield _Linear("mlp.shared_experts.linear_fc1", shared, d, "rows")
        yield _Linear("mlp.shared_experts.linear_fc2", d, shared, "columns")
