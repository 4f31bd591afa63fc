"""Gathers and reduce-scatters of parts of unequal length, on a host.

NCCL's take lists of tensors of any sizes; gloo wants one size. Megatron passes such lists where
the ranks that share an expert's weights have got different numbers of tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Let all_gather and reduce_scatter take parts of any sizes; equal ones go on as before.

    Does nothing the second time.
    """
    if dist.all_gather.__module__ == __name__:
        return
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _equal(tensor_list):
            return gather(tensor_list, tensor, group=group, async_op=async_op)
        _refuse_background("all_gather", async_op)
        for rank, part in enumerate(tensor_list):
            if rank == dist.get_rank(group):
                part.copy_(tensor)
            if part.numel():
                dist.broadcast(part, group=group, group_src=rank)
        return None

    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if _equal(input_list):
            return scatter(output, input_list, op=op, group=group, async_op=async_op)
        _refuse_background("reduce_scatter", async_op)
        for rank, part in enumerate(input_list):
            here = rank == dist.get_rank(group)
            total = output.copy_(part) if here else part.clone()
            if part.numel():
                dist.reduce(total, op=op, group=group, group_dst=rank)
        return None

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def _equal(parts: Sequence[torch.Tensor]) -> bool:
    return all(part.shape == parts[0].shape for part in parts)


def _refuse_background(name: str, async_op: bool) -> None:
    if async_op:
        raise NotImplementedError(f"{name}(async_op=True) of unequal parts on a host")
