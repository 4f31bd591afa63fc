"""From a recipe to Megatron's TransformerConfig and HybridModel.

Recipe fields that bear a Megatron name are passed on unchanged; everything derived is
derived here (layer counts from the pattern, the initial standard deviation, dtypes).
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from model.gemms import policy_of
from model.pattern import parse_pattern
from precision.apply import apply_policy, transformer_fields
from recipes.schema import ModelConfig, ParallelConfig, PrecisionConfig, Recipe

if TYPE_CHECKING:
    import torch
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_config import TransformerConfig

_NOT_MEGATRON = {
    "name",
    "hybrid_layer_pattern",
    "vocab_size",
    "max_position_embeddings",
    "mamba_d_conv",
    "mamba_chunk_size",
    "init_method_std",
}
"""Fields of ModelConfig that TransformerConfig does not take: arguments of the model or of
its Mamba mixer, or derived below."""

_NOT_CONFIG = {
    "data_parallel_size",
    "sequence_parallel",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "timeout_minutes",
    "mamba_context",
    "cross_entropy_loss_chunk",
}
"""Fields of ParallelConfig that TransformerConfig does not take or that are derived below."""


def init_method_std(model: ModelConfig) -> float:
    """sqrt(0.8 / hidden_size) unless the recipe says otherwise: the rule behind the published
    0.0173, 0.014 and 0.0099 of Nano, Super and Ultra."""
    return model.init_method_std or math.sqrt(0.8 / model.hidden_size)


def params_dtype(precision: PrecisionConfig) -> "torch.dtype":
    """torch dtype of parameters and activations."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision.params_dtype]


def transformer_config(
    model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig
) -> "TransformerConfig":
    """Megatron's configuration of the model under a layout. The recipe must be validated."""
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    pattern = parse_pattern(model.hybrid_layer_pattern)
    same: dict[str, Any] = {
        f.name: getattr(model, f.name) for f in fields(model) if f.name not in _NOT_MEGATRON
    }
    same |= {
        f.name: getattr(parallel, f.name) for f in fields(parallel) if f.name not in _NOT_CONFIG
    }
    tp = parallel.tensor_model_parallel_size
    dtype = params_dtype(precision)
    # `-` layers are the only users of ffn_hidden_size, but Megatron always wants one.
    same["ffn_hidden_size"] = model.ffn_hidden_size or 4 * model.hidden_size
    same |= transformer_fields(
        precision, model.num_moe_experts is not None, parallel.moe_token_dispatcher_type
    )
    pp = parallel.pipeline_model_parallel_size
    virtual = len(pattern.stages) // pp if pp > 1 else 1
    return TransformerConfig(
        **same,
        num_layers=pattern.num_layers,
        mtp_num_layers=pattern.mtp_depths or None,
        is_hybrid_model=True,
        init_method_std=init_method_std(model),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.params_dtype == "bf16",
        sequence_parallel=tp > 1
        if parallel.sequence_parallel is None
        else parallel.sequence_parallel,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        # Batched exchanges go wrong in the interleaved schedule of two pipeline ranks: each is
        # the other's predecessor and successor, and activations meet gradients.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        normalization="RMSNorm",
        activation_func=squared_relu,
        gated_linear_unit=False,
        add_bias_linear=False,
        moe_grouped_gemm=model.num_moe_experts is not None,
        use_fused_weighted_squared_relu=True,
        bias_dropout_fusion=False,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        # Gradients are divided by the number of tokens at the end of the step, so the result
        # does not depend on how the batch is cut into micro batches and ranks.
        calculate_per_token_loss=True,
    )


def build_model(
    recipe: Recipe,
    config: "TransformerConfig",
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> "HybridModel":
    """One pipeline stage of the model, on the current device, in the formats the precision
    policy starts with. Its weights depend on `run.seed`, not on the layout.

    torch.distributed, Megatron's parallel state and its RNG tracker must be initialised.
    """
    from model.initial import draw_weights, undrawn

    pattern = recipe.model.hybrid_layer_pattern
    if config.pipeline_model_parallel_size == 1:
        pattern = pattern.replace("|", "")  # Megatron would build the first stage alone
    model = _model_class(recipe)
    with undrawn(config):
        built = model(
            config=config,
            hybrid_stack_spec=_layer_spec(recipe),
            vocab_size=recipe.model.vocab_size,
            max_sequence_length=recipe.model.max_position_embeddings,
            hybrid_layer_pattern=pattern,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
    if not next(built.parameters()).is_meta:
        draw_weights(built, recipe.run.seed, recipe.model.mamba_d_conv)
    apply_policy([built], policy_of(recipe))
    return built


def _model_class(recipe: Recipe) -> "Callable[..., HybridModel]":
    """Megatron's model, or ours on top of it where its loss does not do."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    chunk = recipe.parallel.cross_entropy_loss_chunk
    split = recipe.parallel.context_parallel_size > 1
    if not split and not recipe.data.inter_document_masking and chunk is None:
        return HybridModel
    from model.context_model import ContextModel

    return partial(ContextModel, loss_chunk=chunk)


def _layer_spec(recipe: Recipe) -> Any:
    """Megatron's spec of the layers: two arguments of the Mamba mixer set, and modules replaced
    where documents or states cross ranks."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    layers = hybrid_stack_spec.submodules
    mamba = layers.mamba_layer
    sizes = {"d_conv": recipe.model.mamba_d_conv, "chunk_size": recipe.model.mamba_chunk_size}
    mixer = replace(mamba.submodules.mixer, params=sizes)
    changed: dict[str, Any] = {}
    if recipe.parallel.context_parallel_size > 1:
        from model.context_mixers import StatePassingMixer, WholePackMixer

        if recipe.parallel.mamba_context == "state":
            mixer = replace(mixer, module=StatePassingMixer)
        elif recipe.data.inter_document_masking:
            mixer = replace(mixer, module=WholePackMixer)
    if recipe.data.inter_document_masking:
        from model.context_model import DocumentPredictionLayer

        block = layers.mtp_block_spec
        layer = replace(block.submodules.layer_specs[0], module=DocumentPredictionLayer)
        changed["mtp_block_spec"] = replace(
            block, submodules=replace(block.submodules, layer_specs=[layer])
        )
    changed["mamba_layer"] = replace(mamba, submodules=replace(mamba.submodules, mixer=mixer))
    return replace(hybrid_stack_spec, submodules=replace(layers, **changed))
