"""Collectives in place: nothing moves in a group of one rank, and larger groups are untouched."""

from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed


def _in_place(rank: int, world_size: int) -> tuple[list[float], list[float], list[float]]:
    from model.backends import install_backends

    install_backends("host")
    mine: Any = [dist.new_group([r]) for r in range(world_size)][rank]
    alone = torch.arange(4.0) + rank
    dist.reduce_scatter_tensor(alone, alone, group=mine)
    handle = dist.all_gather_into_tensor(alone, alone, group=mine, async_op=True)
    assert handle is not None and handle.wait() and handle.is_completed()

    shared = torch.arange(4.0) + rank
    part = shared.view(world_size, -1)[rank]
    dist.reduce_scatter_tensor(part, shared)
    dist.all_gather_into_tensor(shared, part.clone())

    elsewhere = torch.zeros(4)
    dist.reduce_scatter_tensor(elsewhere, alone, group=mine)
    return alone.tolist(), shared.tolist(), elsewhere.tolist()


def test_groups_of_one_and_of_two() -> None:
    for rank, (alone, shared, elsewhere) in enumerate(run_distributed(_in_place, 2)):
        assert alone == elsewhere == [rank, rank + 1, rank + 2, rank + 3]
        assert shared == [1, 3, 5, 7]
