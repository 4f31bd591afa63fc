"""torch.distributed, Megatron's process groups and its RNG tracker: up and down."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from recipes.schema import ParallelConfig


def initialize_groups(parallel: ParallelConfig, seed: int, virtual_stages: int = 1) -> None:
    """Build Megatron's process groups over the initialised torch.distributed world and seed
    the model-parallel random states."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(parallel.timeout_minutes)),
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy_groups() -> None:
    """Tear down what `initialize_groups` and torch.distributed built."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    parallel_state.destroy_model_parallel()
    # Megatron keeps these for the process; their size is that of the model just trained.
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def one_rank(seed: int = 0) -> Iterator[None]:
    """A world of this process alone, for commands that build a model but do not train."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(minutes=5),
    )
    initialize_groups(ParallelConfig(), seed)
    try:
        yield
    finally:
        destroy_groups()


def forked_world(purpose: str) -> Callable[[], None]:
    """What a process forked from this rank calls to leave the rank's world, of whose threads it has
    none, and to join that of the processes forked from the other ranks, over gloo.

    All ranks call this, each time before such a fork, and all the processes what it returns.
    Megatron's groups are not built.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    rank, size = dist.get_rank(), dist.get_world_size()
    inherited = distributed_c10d._get_default_store()
    number = inherited.add(f"{purpose} of rank {rank}", 1)

    def join() -> None:
        store = inherited.clone()  # the connection is the rank's
        # Not destroyed: that would wait for its threads. Megatron's groups keep the rest.
        dist.GroupMember.WORLD = None
        store = dist.PrefixStore(f"{purpose} {number}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)

    return join
