"""What a run is at one moment, and as a checkpoint holds it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from precision.backend import rounding_state, set_rounding_state
from train.optimizer_shares import shares_in_place
from train.optimizer_state import SHARDING, padding_kept

RNG = "rng_state"
"""Under which every rank has its random states."""


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    """Optimizer steps done, dropped ones included."""
    consumed_samples: int = 0
    """Sequences read."""
    consumed_tokens: int = 0
    """Tokens read; the position of the learning-rate schedule."""


@dataclass
class TrainState:
    """Everything a checkpoint holds."""

    chunks: list[Any]
    """DDP-wrapped model chunks of this rank."""
    optimizer: Any
    """Megatron optimizer."""
    schedule: Any
    """Megatron OptimizerParamScheduler."""
    progress: Progress = field(default_factory=Progress)
    layout: dict[str, int] = field(default_factory=dict)
    """Parallel sizes, written into meta.json; random states load only into the same layout."""
    law_tokens: int = 0
    """Tokens of the run before the schedule began: another stage may have had its own."""

    def place_schedule(self) -> None:
        """Put the schedule where the progress is."""
        self.schedule.num_steps = self.progress.consumed_tokens - self.law_tokens
        self.schedule.step(increment=0)

    def gather_parameters(self) -> None:
        """Give every rank the whole of the last update, before its weights are read. With
        `overlap_param_gather` it has only its own share of it until the next forward pass."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                with torch.no_grad():
                    chunk.start_param_sync(force_sync=True)


def content_metadata() -> dict[str, Any]:
    """What decides the format of Megatron's sharded state dicts."""
    return {
        "distrib_optim_sharding_type": SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def state_dict(state: TrainState, loading: bool) -> dict[str, Any]:
    """Everything a checkpoint holds as Megatron's sharded tensors and objects, and plain values.

    Args:
        state: to save, or to load into.
        loading: what is asked of a checkpoint, instead of what goes into one.
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.utils import unwrap_model

    metadata = content_metadata() | {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)
    }
    result: dict[str, Any] = {}
    for i, chunk in enumerate(state.chunks):
        key = model_key(i, len(state.chunks))
        result[key] = unwrap_model(chunk).sharded_state_dict(metadata=metadata)
    # One chunk's names repeat in the next (layers are counted from 0 in each), so chunks stay
    # apart.
    models = dict(result) if len(state.chunks) > 1 else result["model"]
    with padding_kept(state.optimizer), shares_in_place(state.optimizer):
        optimizer = state.optimizer.sharded_state_dict(
            models, is_loading=loading, metadata=metadata
        )
    several = len(state.optimizer.chained_optimizers) > 1
    result["optimizer"] = optimizer if several else {0: optimizer}
    result["schedule"] = state.schedule.state_dict()
    result["progress"] = asdict(state.progress)
    result[RNG] = ShardedObject(
        RNG, _rng_state(), (dist.get_world_size(),), (dist.get_rank(),), replica_id=0
    )
    return result


def model_key(index: int, count: int) -> str:
    """What a chunk's weights are under."""
    return "model" if count == 1 else f"model{index}"


def _rng_state() -> dict[str, Any]:
    """Every generator training may draw from. On a host CPU and CUDA state are one."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
        "rounding": rounding_state(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    set_rounding_state(state.get("rounding"))  # checkpoints of before have none
