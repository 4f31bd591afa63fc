"""The mailbox through which a forked writer reports."""

import multiprocessing
import queue

import pytest

from train.writing import Mailbox


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
