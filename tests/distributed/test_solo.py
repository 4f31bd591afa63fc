"""Collectives of a group of one rank, which are done at once; larger groups are untouched."""

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


def _others(rank: int, world_size: int) -> dict[str, Any]:
    from model.backends import install_backends

    install_backends("host")
    mine: Any = [dist.new_group([r]) for r in range(world_size)][rank]
    found: dict[str, Any] = {}
    for name, group in (("alone", mine), ("all", None)):
        total, mean, first = (torch.full((2,), float(rank + 1)) for _ in range(3))
        dist.all_reduce(total, group=group)
        handle = dist.all_reduce(mean, dist.ReduceOp.MAX, group=group, async_op=True)
        assert handle is not None and handle.wait()
        dist.broadcast(first, group=group, group_src=0)
        dist.barrier(group)
        size = dist.get_world_size(group)
        parts = [torch.zeros(2) for _ in range(size)]
        dist.all_gather(parts, torch.full((2,), float(rank + 1)), group=group)
        objects: list[Any] = [None] * size
        dist.all_gather_object(objects, {"rank": rank}, group=group)
        tensors = [total, mean, first, *parts]
        found[name] = [t.tolist() for t in tensors], [o["rank"] for o in objects]
    return found


def test_the_others_in_groups_of_one_and_of_two() -> None:
    ranks = run_distributed(_others, 2)
    for rank, found in enumerate(ranks):
        assert found["alone"] == ([[rank + 1.0] * 2] * 4, [rank])
        assert found["all"] == ([[3.0] * 2, [2.0] * 2, [1.0] * 2, [1.0] * 2, [2.0] * 2], [0, 1])


def test_groups_of_one_and_of_two() -> None:
    for rank, (alone, shared, elsewhere) in enumerate(run_distributed(_in_place, 2)):
        assert alone == elsewhere == [rank, rank + 1, rank + 2, rank + 3]
        assert shared == [1, 3, 5, 7]
