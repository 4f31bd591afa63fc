"""Model, optimizer and schedule of one rank, wired together the way Megatron wants them."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from model.hybrid import build_model, transformer_config
from model.pattern import parse_pattern
from precision.backend import seed_rounding
from recipes.schema import Recipe
from train.optimizer import build_optimizer, build_schedule
from train.state import TrainState
from train.step import Routers

if TYPE_CHECKING:
    from parallel.layout import Layout


def build_state(recipe: Recipe, layout: "Layout") -> tuple[TrainState, Routers]:
    """Everything a checkpoint holds, freshly initialised, and the model's routers."""
    # Stochastic rounding draws other numbers on every rank.
    seed_rounding((recipe.run.seed << 20) + dist.get_rank())
    config = transformer_config(recipe.model, recipe.precision, recipe.parallel)
    chunks = [_wrap(recipe, config, chunk) for chunk in _build_chunks(recipe, config)]
    optimizer = build_optimizer(chunks, recipe.optimizer, recipe.precision, recipe.parallel)
    schedule = build_schedule(optimizer, recipe.optimizer, recipe.stage)
    schedule.step(increment=0)
    routers = Routers(chunks, parse_pattern(recipe.model.hybrid_layer_pattern))
    config.finalize_model_grads_func = routers.finalize
    config.grad_scale_func = optimizer.scale_loss
    if recipe.parallel.overlap_grad_reduce:
        config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    if recipe.parallel.overlap_param_gather:
        starts = [partial(c.start_param_sync) for c in chunks]
        config.param_sync_func = starts if len(chunks) > 1 else starts[0]
    state = TrainState(chunks, optimizer, schedule, layout=_sizes(layout))
    return state, routers


def _build_chunks(recipe: Recipe, config: Any) -> list[Any]:
    """This rank's model chunks: one, or one a virtual pipeline stage."""
    from megatron.core import parallel_state

    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual) if virtual else [None]:
        ends = {
            "pre_process": parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=stage
            ),
            "post_process": parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=stage
            ),
        }
        chunks.append(build_model(recipe, config, **ends, vp_stage=stage))
    return chunks


def _wrap(recipe: Recipe, config: Any, model: Any) -> Any:
    """Megatron's mixed-precision and data-parallel wrappers around one chunk."""
    import torch
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.transformer.module import Float16Module

    model = model.to(torch.cuda.current_device())
    if config.bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=recipe.parallel.overlap_grad_reduce,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,  # train.guards decides, for all ranks together
    )
    wrapped = DistributedDataParallel(config, ddp, model)
    wrapped.broadcast_params()
    return wrapped


def _sizes(layout: "Layout") -> dict[str, int]:
    """The sizes that decide which rank holds what."""
    return {name: getattr(layout, name) for name in ("tp", "pp", "cp", "dp", "ep", "etp")}
