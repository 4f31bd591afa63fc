"""What ranks agree on, and worlds of processes that were forked from them."""

import os
import time

import torch
import torch.distributed as dist

from data.ranks import raise_together
from parallel.groups import forked_world
from recipes.errors import CheckpointError
from tests.distributed.harness import run_distributed
from train.forked import Mailbox


def raised(rank: int, world_size: int, errors: dict[int, Exception]) -> str:
    try:
        raise_together(errors.get(rank))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_explained_error_comes_before_those_it_causes() -> None:
    lost, lost_too = RuntimeError("connection closed"), RuntimeError("connection reset")
    full = CheckpointError("the disk is full")
    for errors, wanted in (
        ({}, "nothing"),
        ({1: lost, 2: lost_too}, "RuntimeError: connection closed"),
        ({0: lost, 2: full}, "CheckpointError: the disk is full"),
    ):
        assert run_distributed(raised, 3, errors) == [wanted] * 3


def worlds(rank: int, world_size: int) -> list[list[float]]:
    """Sums over the ranks, and over two processes of each, which are at it at the same time."""

    def sums(number: float) -> list[float]:
        totals = []
        for i in range(20):
            total = torch.tensor(number + i)
            dist.all_reduce(total)
            totals.append(float(total))
        return totals

    children, found = [], [Mailbox(), Mailbox()]
    for i, mailbox in enumerate(found):
        join = forked_world("adders")
        child = os.fork()
        if child == 0:
            try:
                time.sleep(0.2 * ((rank + i) % 2))  # the second may be the first to join
                join()
                mailbox.put(sums(rank + 100.0 * (i + 1)))
            finally:
                os._exit(0)
        children.append(child)
    own = sums(float(rank))
    for child in children:
        os.waitpid(child, 0)
    return [own, *(mailbox.get_nowait() for mailbox in found)]


def test_forked_processes_have_worlds_of_their_own() -> None:
    wanted = [[3.0 * (base + i) + 3 for i in range(20)] for base in (0, 100, 200)]
    assert run_distributed(worlds, 3) == [wanted] * 3
