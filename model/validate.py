"""Is this recipe a model that can be built and trained? Plain Python, before anything is built.

`validate_recipe` is the one entry point: rules of the run (recipes/validate.py), of the model
(here), of the layout (parallel/layout.py) and of precision (precision/policy.py). Nothing here
imports torch.
"""

import contextlib
from collections.abc import Iterator

from model.gemms import policy_of
from model.pattern import LAYERS, Pattern, parse_pattern
from parallel.layout import Layout, validate_layout
from precision.apply import transformer_fields
from precision.policy import check_sizes
from recipes.errors import ConfigError
from recipes.rules import above, at_least, divides, fail, listed, one_of, within
from recipes.schema import ModelConfig, ParallelConfig, Recipe
from recipes.stages import Span, spans, stage_recipes
from recipes.validate import lengths_apart, validate_run

_POSITIVE = (
    "hidden_size",
    "vocab_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "mamba_num_groups",
    "mamba_chunk_size",
    "moe_router_topk",
)
"""Sizes every model has."""

_POSITIVE_OR_NULL = {
    "ffn_hidden_size": "no dense MLP layer",
    "num_moe_experts": "no MoE layer",
    "moe_ffn_hidden_size": "no MoE layer",
    "moe_shared_expert_intermediate_size": "no shared expert",
    "moe_latent_size": "experts at full width",
    "moe_router_num_groups": "one group",
    "moe_router_group_topk": "one group",
}
"""Optional sizes -> what null means."""

_NEEDED_BY = {"-": ("ffn_hidden_size",), "E": ("num_moe_experts", "moe_ffn_hidden_size")}
"""Layer symbol -> optional sizes it needs."""


def validate_recipe(
    recipe: Recipe, world_size: int | None = None, device: str | None = None
) -> Layout:
    """Check a whole recipe and return its layout with every size known.

    Args:
        world_size: ranks that were launched; None: the fewest the recipe can run on.
        device: "host" or "cuda", as chosen; None: recipe.device, where auto adds no rules.

    Raises:
        ConfigError: the first rule that is broken, with key, value, rule and remedy.
    """
    layout = validate_sizes_apart(recipe, world_size, device)
    check_sizes(policy_of(recipe), rank_tokens(recipe, layout))
    for key, own in lengths_apart(recipe).items():
        if not recipe.stage.mix:
            break
        with _said_of(key):
            other = validate_sizes_apart(own, layout.world_size, device)
            check_sizes(policy_of(own), rank_tokens(own, other))
    return layout


def validate_stages(recipe: Recipe, device: str | None = None) -> list[tuple[Span, Layout]]:
    """Check every stage of a recipe; each with the fewest ranks it can run on.

    Raises:
        ConfigError: the first rule that a stage breaks, with its name.
    """
    if not recipe.stages:
        return [(Span(recipe), validate_recipe(recipe, device=device))]
    found, first = [], stage_recipes(recipe)[0]
    for one in stage_recipes(recipe):
        with _said_of(f"stages.{one.stage.name}"):
            _same_in_every_stage(first, one)
            validate_run(one, whole_schedule=False)
    for span in spans(recipe):
        with _said_of(f"stages.{span.name}"):
            found.append((span, validate_recipe(span.recipe, device=device)))
    return found


def _same_in_every_stage(first: Recipe, one: Recipe) -> None:
    """What all stages share, though a recipe of a group may say otherwise."""
    tokenizers = first.data.tokenizer, one.data.tokenizer
    rules = (
        ("data.tokenizer.library", tokenizers[0].library, tokenizers[1].library),
        ("data.tokenizer.path", tokenizers[0].path, tokenizers[1].path),
        ("precision.params_dtype", first.precision.params_dtype, one.precision.params_dtype),
    )
    for key, firsts, value in rules:
        if value != firsts:
            fail(key, value, f"differs from {firsts} of the first stage", "use one for all")


@contextlib.contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Put the place before the message of a broken rule."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def rank_tokens(recipe: Recipe, layout: Layout) -> int:
    """Tokens of one micro batch that one rank of the dense layers has at its hands."""
    split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    return recipe.stage.micro_batch_size * recipe.stage.sequence_length // split


def validate_sizes_apart(
    recipe: Recipe, world_size: int | None = None, device: str | None = None
) -> Layout:
    """`validate_recipe` without the rule that quantised matrices divide into blocks, for
    `python -m precision.explain`, which shows where they do not."""
    validate_run(recipe)
    pattern = validate_model(recipe.model)
    layout = validate_layout(
        recipe.parallel,
        recipe.model,
        recipe.stage,
        world_size,
        symbols=pattern.main + pattern.mtp,
        num_layers=pattern.num_layers,
        num_stages=len(pattern.stages),
        mtp_depths=pattern.mtp_depths,
    )
    _residual(recipe)
    _documents(recipe)
    if (device or recipe.device) == "host":
        _host(recipe)
    elif recipe.parallel.moe_token_dispatcher_type == "flex":
        _flex(recipe.parallel, recipe.model)
    if (device or recipe.device) == "cuda":
        _cuda(recipe)
    policy_of(recipe)
    _fp8_mamba(recipe, pattern)
    return layout


def validate_model(model: ModelConfig) -> Pattern:
    """Check what does not depend on the layout, and return the parsed pattern."""
    pattern = parse_pattern(model.hybrid_layer_pattern)
    for name in _POSITIVE:
        at_least(f"model.{name}", getattr(model, name), 1)
    for name, meaning in _POSITIVE_OR_NULL.items():
        at_least(f"model.{name}", getattr(model, name), 1, meaning)
    # The causal_conv1d kernels have these widths only.
    one_of("model.mamba_d_conv", model.mamba_d_conv, (2, 3, 4))
    divides(
        "model.num_query_groups",
        model.num_query_groups,
        "model.num_attention_heads",
        model.num_attention_heads,
    )
    divides(
        "model.mamba_num_groups",
        model.mamba_num_groups,
        "model.mamba_num_heads",
        model.mamba_num_heads,
    )
    for symbol, names in _NEEDED_BY.items():
        for name in names:
            if symbol in pattern.main + pattern.mtp and getattr(model, name) is None:
                fail(
                    f"model.{name}",
                    None,
                    f"but model.hybrid_layer_pattern has {LAYERS[symbol]} layers ({symbol})",
                    "give it a size",
                )
    for name in ("hidden_dropout", "attention_dropout"):
        within(f"model.{name}", getattr(model, name), 0, 1)
    above("model.layernorm_epsilon", model.layernorm_epsilon, 0)
    above("model.init_method_std", model.init_method_std, 0, "sqrt(0.8 / hidden_size)")
    at_least("model.mtp_loss_scaling_factor", model.mtp_loss_scaling_factor, 0)
    _router(model)
    return pattern


def _router(model: ModelConfig) -> None:
    """Rules of TransformerConfig.__post_init__ and of megatron.core's TopKRouter."""
    one_of(
        "model.moe_router_score_function", model.moe_router_score_function, ("sigmoid", "softmax")
    )
    one_of("model.moe_router_dtype", model.moe_router_dtype, ("fp32", "fp64", None))
    one_of(
        "model.moe_router_load_balancing_type",
        model.moe_router_load_balancing_type,
        ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    )
    at_least("model.moe_aux_loss_coeff", model.moe_aux_loss_coeff, 0)
    at_least("model.moe_router_bias_update_rate", model.moe_router_bias_update_rate, 0)
    above("model.moe_router_topk_scaling_factor", model.moe_router_topk_scaling_factor, 0, "1")
    experts, topk = model.num_moe_experts, model.moe_router_topk
    if experts is not None and topk > experts:
        fail(
            "model.moe_router_topk",
            topk,
            f"is more than model.num_moe_experts={experts}",
            f"use {experts} or fewer",
        )
    if model.moe_router_score_function == "softmax":
        if model.moe_router_enable_expert_bias:
            fail(
                "model.moe_router_enable_expert_bias",
                True,
                "works only with sigmoid scores, not model.moe_router_score_function=softmax",
                "use false, or sigmoid scores",
            )
        if topk == 1:
            fail(
                "model.moe_router_topk",
                topk,
                "with model.moe_router_score_function=softmax gives the router no gradient",
                "use 2 or more, or sigmoid scores",
            )
    _router_groups(model)


def _router_groups(model: ModelConfig) -> None:
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    if groups is None and chosen is None:
        return
    if groups is None or chosen is None:
        fail(
            "model.moe_router_num_groups",
            groups,
            f"and model.moe_router_group_topk={chosen or 'null'} belong together",
            "give both or set both to null",
        )
    experts, topk = model.num_moe_experts, model.moe_router_topk
    if experts is None:
        return
    divides("model.moe_router_num_groups", groups, "model.num_moe_experts", experts)
    # A group is scored by its topk / group_topk best experts, so that must be whole.
    fits = [d for d in range(1, groups + 1) if topk % d == 0 and topk // d <= experts // groups]
    if chosen not in fits:
        fail(
            "model.moe_router_group_topk",
            chosen,
            f"does not spread model.moe_router_topk={topk} evenly over at most {groups} groups "
            f"of {experts // groups} experts",
            f"use {listed(fits)}" if fits else "change the number of groups",
        )


def _fp8_mamba(recipe: Recipe, pattern: Pattern) -> None:
    """Megatron asserts this of every Mamba mixer of a model that uses FP8 anywhere."""
    model, moe = recipe.model, recipe.model.num_moe_experts is not None
    rows = (
        2 * model.mamba_num_heads * model.mamba_head_dim
        + 2 * model.mamba_num_groups * model.mamba_state_dim
        + model.mamba_num_heads
    )
    fields = transformer_fields(recipe.precision, moe, recipe.parallel.moe_token_dispatcher_type)
    if "fp8" in fields and "M" in pattern.main + pattern.mtp and rows % 16:
        fail(
            "model.mamba_num_heads",
            model.mamba_num_heads,
            f"gives mixer.in_proj {rows} rows, and Megatron wants a multiple of 16 wherever "
            "something runs in MXFP8",
            "use a multiple of 16 heads",
        )


def _residual(recipe: Recipe) -> None:
    """Transformer Engine's layers with a norm inside want input and weights of one type."""
    dtype = recipe.precision.params_dtype
    if recipe.model.fp32_residual_connection and dtype != "fp32":
        fail(
            "model.fp32_residual_connection",
            True,
            f"gives Transformer Engine FP32 inputs for weights of precision.params_dtype={dtype}, "
            "which it refuses",
            "use false, or precision=fp32",
        )


def _documents(recipe: Recipe) -> None:
    """Megatron packs documents into one row."""
    size = recipe.stage.micro_batch_size
    if recipe.data.inter_document_masking and size > 1:
        fail(
            "data.inter_document_masking",
            True,
            f"packs one sequence a micro batch, but stage.micro_batch_size={size}",
            "use stage.micro_batch_size=1",
        )


def _flex(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Rules of megatron.core's MoEFlexTokenDispatcher."""
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    if parallel.moe_flex_dispatcher_backend == "deepep" and ranks == 1:
        fail(
            "parallel.moe_flex_dispatcher_backend",
            "deepep",
            "sends between expert-parallel ranks, but there is one",
            "raise parallel.expert_model_parallel_size, or use alltoall",
        )
    if model.moe_router_dtype != "fp32":
        fail(
            "model.moe_router_dtype",
            model.moe_router_dtype,
            "but parallel.moe_token_dispatcher_type=flex sends FP32 probabilities",
            "use fp32",
        )


def _cuda(recipe: Recipe) -> None:
    """What the GPU libraries do not do."""
    if recipe.data.inter_document_masking and recipe.parallel.context_parallel_size > 1:
        fail(
            "data.inter_document_masking",
            True,
            "does not go with context_parallel_size="
            f"{recipe.parallel.context_parallel_size} on GPUs: Transformer Engine wants every "
            "document cut into 2 cp equal parts",
            "use false, parallel.context_parallel_size=1 or device=host",
        )


def _host(recipe: Recipe) -> None:
    """What the stand-ins of a machine without a GPU do not do."""
    parallel, dropout = recipe.parallel, recipe.model.attention_dropout
    blocks = parallel.context_parallel_size > 1 or recipe.data.inter_document_masking
    if blocks and dropout > 0:
        fail(
            "model.attention_dropout",
            dropout,
            "is not implemented without a GPU where attention crosses context-parallel ranks or "
            "ends at documents",
            "use 0, or device=cuda",
        )
    if parallel.moe_token_dispatcher_type == "flex":
        fail(
            "parallel.moe_token_dispatcher_type", "flex", "needs GPUs", "use alltoall or allgather"
        )
