"""Forked processes: what they report, and that they end with their parent."""

import multiprocessing
import os
import queue
import resource
import signal

import pytest
import torch
import torch.distributed as dist

from parallel.host_memory import own_pages
from recipes.errors import CheckpointError
from train.forked import Forked, Mailbox, can_act, take_back


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


def test_what_a_child_sees_and_raises() -> None:
    seen, numbers = Mailbox(), torch.ones(1000, 1000)
    forked = Forked(lambda: seen.put((numbers.sum().item(), torch.get_num_threads())))
    numbers.zero_()
    assert forked.ended(blocking=True) and forked.outcome() is None
    assert seen.get_nowait() == (1e6, 1)

    def fail() -> None:
        raise CheckpointError("the disk is full")

    failed = Forked(fail)
    assert failed.ended(blocking=True)
    error = failed.outcome()
    assert isinstance(error, CheckpointError) and str(error) == "the disk is full"
    assert "in fail" in error.__notes__[0], "where it happened"


def test_what_is_taken_back_is_not_copied_by_the_next_write() -> None:
    numbers = torch.ones(16, 2**20)

    def faults_of_a_write() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        numbers.add_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if not own_pages(numbers.data_ptr(), numbers.nbytes):
        pytest.skip("needs MADV_POPULATE_WRITE, which is in Linux since 5.14")
    pages = numbers.nbytes // os.sysconf("SC_PAGE_SIZE")
    sees, go = Mailbox(), multiprocessing.get_context("fork").Event()

    def look() -> None:
        go.wait(30)
        sees.put(numbers.sum().item())

    for taken in (False, True):
        child = Forked(look)
        if taken:
            take_back([numbers, numbers[3]]).join()
        faults = faults_of_a_write()
        go.set()
        assert child.ended(blocking=True) and child.outcome() is None
        assert sees.get_nowait() == numbers.sum().item() - numbers.numel()
        assert faults < pages / 10 if taken else faults > pages / 2
        go.clear()


def test_a_child_that_is_killed() -> None:
    killed = Forked(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert killed.ended(blocking=True)
    assert isinstance(killed.outcome(), ChildProcessError)


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
        forked = Forked(lambda: found.put(collectives()))
        assert forked.ended(blocking=True) and forked.outcome() is None
        assert found.get_nowait() == collectives() == [[1.0] * 3, [{"a": 1}], ["b"]]
