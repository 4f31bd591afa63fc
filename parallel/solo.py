"""Collectives of one rank that have nothing to do, on a host.

NCCL sees that a group of one rank has its result already. Gloo copies a buffer that is reduced or
gathered in place to fresh memory and back (measured: a tenth of a step of the small model), and
hands everything to a thread of its own, which a forked process (train/forked.py) has not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_SUM_LIKE = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.MIN)


class Done:
    """The handle of a collective that has ended."""

    def wait(self, timeout: Any = None) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """Whether it has ended."""
        return True


def install() -> None:
    """Let collectives whose result is there return at once in groups of one rank: reductions,
    gathers and reduce-scatters in place, broadcasts, barriers, and the gathers of small tensors
    that torch passes objects with.

    Does nothing the second time. Must run before megatron takes the functions by value.
    """
    if dist.all_gather_into_tensor.__module__ == __name__:
        return
    gather_into, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    reduce, send, wait = dist.all_reduce, dist.broadcast, dist.barrier
    gather_all, gather_one = dist.all_gather, dist.gather

    def all_gather_into_tensor(
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _in_place(output_tensor, input_tensor) and _alone(group):
            return _done(async_op)
        return gather_into(output_tensor, input_tensor, group=group, async_op=async_op)

    def reduce_scatter_tensor(
        output: torch.Tensor,
        input: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if op in _SUM_LIKE and _in_place(output, input) and _alone(group):
            return _done(async_op)
        return scatter(output, input, op=op, group=group, async_op=async_op)

    def all_reduce(
        tensor: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if op in _SUM_LIKE and _alone(group):
            return _done(async_op)
        return reduce(tensor, op=op, group=group, async_op=async_op)

    def broadcast(
        tensor: torch.Tensor,
        src: int | None = None,
        group: Any = None,
        async_op: bool = False,
        group_src: int | None = None,
    ) -> Any:
        if _alone(group):
            return _done(async_op)
        return send(tensor, src, group, async_op, group_src)

    def barrier(group: Any = None, async_op: bool = False, *args: Any, **kwargs: Any) -> Any:
        if _alone(group):
            return _done(async_op)
        return wait(group, async_op, *args, **kwargs)

    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _alone(group) and _fits(tensor_list, tensor):
            tensor_list[0].copy_(tensor)
            return _done(async_op)
        return gather_all(tensor_list, tensor, group=group, async_op=async_op)

    def gather(
        tensor: torch.Tensor,
        gather_list: list[torch.Tensor] | None = None,
        dst: int | None = None,
        group: Any = None,
        async_op: bool = False,
        group_dst: int | None = None,
    ) -> Any:
        if gather_list is not None and _alone(group) and _fits(gather_list, tensor):
            gather_list[0].copy_(tensor)
            return _done(async_op)
        return gather_one(tensor, gather_list, dst, group, async_op, group_dst)

    replaced: tuple[Callable[..., Any], ...] = (
        all_gather_into_tensor,
        reduce_scatter_tensor,
        all_reduce,
        broadcast,
        barrier,
        all_gather,
        gather,
    )
    for function in replaced:
        for module in (dist, distributed_c10d):  # torch's own functions find them in the latter
            setattr(module, function.__name__, function)


def _alone(group: Any) -> bool:
    return dist.get_world_size(group) == 1


def _in_place(output: torch.Tensor, source: torch.Tensor) -> bool:
    """The result of one rank is where it should be."""
    return (
        output.data_ptr() == source.data_ptr()
        and output.numel() == source.numel()
        and output.dtype == source.dtype
    )


def _fits(parts: list[torch.Tensor], tensor: torch.Tensor) -> bool:
    """Anything else is an error, which is the library's to explain."""
    return len(parts) == 1 and parts[0].shape == tensor.shape and parts[0].dtype == tensor.dtype


def _done(async_op: bool) -> Done | None:
    return Done() if async_op else None
