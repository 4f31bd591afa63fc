"""Forked processes: what they report and are able to do."""

import multiprocessing
import queue

import pytest
import torch
import torch.distributed as dist

from train.forked import Mailbox, can_act


def test_a_child_leaves_any_size_before_somebody_reads() -> None:
    """A pipe holds 64 KiB: the child would wait for a reader that waits for the child."""
    mailbox = Mailbox()
    for size in (10_000_000, 3):  # the second is smaller than what it replaces
        letter = list(range(size))
        child = multiprocessing.get_context("fork").Process(target=mailbox.put, args=(letter,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert mailbox.get_nowait() == letter
    with pytest.raises(queue.Empty):
        mailbox.get_nowait()


def test_a_child_does_the_collectives_of_one_rank() -> None:
    """Gloo's threads are not there; parallel/solo.py needs none."""
    from parallel.groups import one_rank

    def collectives() -> list[object]:
        total = torch.ones(3)
        gathered: list[object] = [None]
        objects: list[object] = [None]
        dist.all_reduce(total)
        dist.broadcast(total, 0)
        dist.barrier()
        dist.all_gather_object(gathered, {"a": 1})
        dist.gather_object("b", objects)
        dist.broadcast_object_list(objects, src=0)
        return [total.tolist(), gathered, objects]

    with one_rank():
        assert can_act()
        found = Mailbox()
        child = multiprocessing.get_context("fork").Process(target=lambda: found.put(collectives()))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert found.get_nowait() == collectives() == [[1.0] * 3, [{"a": 1}], ["b"]]
