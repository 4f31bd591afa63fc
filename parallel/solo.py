"""Collectives of one rank that have nothing to do, on a host.

The distributed optimizer reduces and gathers its buffers in place. NCCL sees that a group of
one rank has its result already; gloo copies the buffer to fresh memory and back (measured: a
tenth of a step of the small model).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Done:
    """The handle of a collective that has ended."""

    def wait(self, timeout: Any = None) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """Whether it has ended."""
        return True


def install() -> None:
    """Let reduce-scatters and all-gathers in place return at once in groups of one rank.

    Does nothing the second time. Must run before megatron takes the functions by value.
    """
    if dist.all_gather_into_tensor.__module__ == __name__:
        return
    sum_like = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.MIN)
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def all_gather_into_tensor(
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _nothing_to_do(output_tensor, input_tensor, group):
            return Done() if async_op else None
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)

    def reduce_scatter_tensor(
        output: torch.Tensor,
        input: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if op in sum_like and _nothing_to_do(output, input, group):
            return Done() if async_op else None
        return scatter(output, input, op=op, group=group, async_op=async_op)

    _replace(all_gather_into_tensor)
    _replace(reduce_scatter_tensor)


def _nothing_to_do(output: torch.Tensor, source: torch.Tensor, group: Any) -> bool:
    """One rank, and its result is where it should be."""
    return (
        output.data_ptr() == source.data_ptr()
        and output.numel() == source.numel()
        and output.dtype == source.dtype
        and dist.get_world_size(group) == 1
    )


def _replace(function: Callable[..., Any]) -> None:
    setattr(dist, function.__name__, function)
