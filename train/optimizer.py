"""Megatron's optimizer and its parameter schedule, counted in tokens."""

from typing import TYPE_CHECKING, Any

from recipes.schema import OptimizerConfig, ParallelConfig, PrecisionConfig, StageConfig
from recipes.stages import stage_length

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def schedule_tokens(optimizer: OptimizerConfig, stage: StageConfig) -> tuple[int, int, int]:
    """(warmup, decay, whole schedule) in tokens, fractions turned into tokens."""
    whole = int(optimizer.lr_schedule_tokens or stage_length(stage))
    warmup = optimizer.lr_warmup_tokens
    decay = optimizer.lr_wsd_decay_tokens
    return (
        int(warmup if warmup is not None else optimizer.lr_warmup_fraction * whole),
        int(decay if decay is not None else optimizer.lr_wsd_decay_fraction * whole),
        whole,
    )


def build_optimizer(
    model_chunks: list[Any],
    optimizer: OptimizerConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
) -> "MegatronOptimizer":
    """Megatron's distributed AdamW over DDP-wrapped model chunks."""
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    from model.hybrid import params_dtype

    config = MegatronOptimizerConfig(
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=precision.params_dtype == "bf16",
        params_dtype=params_dtype(precision),
        use_distributed_optimizer=True,
        overlap_param_gather=parallel.overlap_param_gather,
        log_num_zeros_in_grad=True,
    )
    return get_megatron_optimizer(config, model_chunks, use_gloo_process_groups=False)


def build_schedule(
    megatron_optimizer: "MegatronOptimizer", optimizer: OptimizerConfig, stage: StageConfig
) -> "OptimizerParamScheduler":
    """Megatron's schedule with a token as its unit: step(increment=tokens)."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    warmup, decay, whole = schedule_tokens(optimizer, stage)
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=whole,
        lr_decay_style=optimizer.lr_decay_style,
        wsd_decay_steps=decay if optimizer.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The recipe is the law: a checkpoint brings the position, not the shape, so that a
        # run can be extended.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
