"""Forked processes: what they report, and that they end with their parent."""

import mmap
import multiprocessing
import os
import queue
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.host_memory import go_without
from recipes.errors import CheckpointError
from train.forked import Forked, Mailbox, can_act


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


def shared_memory(address: int) -> int:
    """Bytes that other processes have too, of the mapping an address is in; others may be in it."""
    found = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(x, 16) for x in first.split("-"))
            inside = start <= address < end
        elif inside and first == "Shared_Dirty:":
            found = int(rest[0]) * 1024
    return found


def test_a_child_goes_without_what_it_does_not_need() -> None:
    """The pages are the parent's own again, as they were, and what the child reads is there."""
    private = mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    dropped, kept = torch.frombuffer(private, dtype=torch.float32).fill_(1), torch.ones(1000)
    context, seen = multiprocessing.get_context("fork"), Mailbox()
    go, gone, end = context.Event(), context.Event(), context.Event()

    def child() -> None:
        go.wait(30)
        go_without([(dropped.data_ptr(), dropped.nbytes)])
        gone.set()
        end.wait(30)
        seen.put((dropped.sum().item(), kept.sum().item()))

    forked = Forked(child)
    before = shared_memory(dropped.data_ptr())
    assert before >= dropped.nbytes
    go.set()
    assert gone.wait(30)
    assert shared_memory(dropped.data_ptr()) <= before - dropped.nbytes
    assert dropped.sum().item() == dropped.numel()
    end.set()
    assert forked.ended(blocking=True) and forked.outcome() is None
    assert seen.get_nowait() == (0, 1000)


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
