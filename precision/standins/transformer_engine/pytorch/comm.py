"""Tensor-parallel collectives along the sequence (first) dimension."""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def group_size(group: Group | None) -> int:
    """Ranks of a group; 1 without one."""
    return 1 if group is None else group.size()


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum of x over the group, in place."""
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


def gather_sequence(x: Tensor, group: Group | None) -> Tensor:
    """[s/tp, ...] on every rank -> [s, ...]."""
    assert group is not None, "sequence parallelism needs a group"
    full = torch.empty((x.shape[0] * group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(full, x.contiguous(), group=group)
    return full


def reduce_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """Sum of [s, ...] over the group, this rank's [s/tp, ...] of it."""
    part = torch.empty((x.shape[0] // group.size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


def maximum(x: Tensor, group: Group) -> None:
    """Largest of x over the group, in place."""
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
