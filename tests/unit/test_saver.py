"""The process that saves: what it sees of this one's objects, what it reports, how it ends."""

import errno
import gc
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import other_memory
from recipes.errors import CheckpointError
from train import saver as module
from train.forked import Mailbox
from train.saver import Saver


@contextmanager
def saving(action: Callable[..., None], say: Callable[[str], None] = print) -> Iterator[Saver]:
    saver = Saver(action, say)
    try:
        yield saver
    finally:
        saver.close()


def objects() -> dict[str, Any]:
    """Tensors of all kinds, large enough to be read and too small for it, among other objects."""
    many = torch.arange(300_000, dtype=torch.float32)
    return {
        "fp32": many.clone(),
        "odd bytes, then others": many[:70_001].to(torch.int8),
        "bf16": torch.nn.Parameter(many[:65_537].bfloat16()),
        "a part of a tensor": many[1000:200_000],
        "every other": many.view(-1, 2)[:, 1],
        "transposed": many.view(3, -1).T,
        "small": many[10:13],
        "a number": torch.tensor(3.5),
        "nothing": torch.empty(0, 4),
        "others": [1, "a", (None, 2.5), {"b": many[:40_000].double()}],
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("allowed", [True, False])
def test_what_it_sees(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything as it was, whatever happens to it later; also where the kernel lets nobody read
    another process' memory."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not allowed:
        monkeypatch.setattr(module, "read_memory", refuse)
    seen = Mailbox()
    said: list[str] = []
    with saving(lambda *given: seen.put(given), said.append) as saver:
        for i in range(2):
            given = objects()
            sent = given if i == 0 else {"one": given["fp32"][:20_000].clone(), "rest": i}
            saver.start(sent, i)
            saver.copied()
            was = objects() if i == 0 else {"one": objects()["fp32"][:20_000], "rest": i}
            for tensor in (t for t in sent.values() if isinstance(t, torch.Tensor)):
                tensor.detach().zero_()
            assert saver.ended(blocking=True) and saver.outcome() is None
            read, number = seen.get_nowait()
            assert number == i and equal(read, was)
    assert len(said) == (0 if allowed else 1), "said once"
    assert all("not permitted" in message for message in said)


def test_small_tensors_may_change_at_once() -> None:
    """The routers' biases do, in the backward pass that the copy is made beside."""
    seen, bias = Mailbox(), torch.ones(512)
    with saving(lambda *given: seen.put(given)) as saver:
        saver.start(bias)
        bias.zero_()
        assert saver.ended(blocking=True) and saver.outcome() is None
    assert torch.equal(seen.get_nowait()[0], torch.ones(512))


def test_what_is_copied_stays_until_then() -> None:
    """Also a copy that only `start` knows, of a tensor whose parts are not side by side."""
    seen = Mailbox()
    with saving(lambda *given: seen.put(given)) as saver:
        saver.start(torch.ones(1000, 1000).T)
        gc.collect()
        others = [torch.zeros(1000, 1000) for _ in range(4)]
        assert saver.ended(blocking=True) and saver.outcome() is None
    assert seen.get_nowait()[0].sum().item() == 1e6 and not others[0].any()


def test_it_shares_no_page_that_this_process_writes() -> None:
    """To write what is being saved takes no copy of a page."""
    with saving(lambda state: time.sleep(0.5)) as saver:
        state = torch.ones(2**24)
        saver.start(state)
        saver.copied()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        state.add_(1)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100
        assert not saver.ended(blocking=False), "it is at it"
        assert saver.ended(blocking=True)


def test_what_it_raises() -> None:
    def fail(message: str) -> None:
        raise CheckpointError(message)

    with saving(fail) as saver:
        for message in ("the disk is full", "the disk is read-only"):  # it goes on after one
            saver.start(message)
            assert saver.ended(blocking=True)
            error = saver.outcome()
            assert isinstance(error, CheckpointError) and str(error) == message
            assert "in fail" in error.__notes__[0], "where it happened"


def test_it_ends_after_what_it_is_at(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether its outcome is read or not."""
    read = module.read_memory

    def late(*arguments: Any) -> None:
        time.sleep(0.3)
        read(*arguments)

    monkeypatch.setattr(module, "read_memory", late)
    seen = Mailbox()
    with saving(lambda *given: seen.put(given)) as saver:
        saver.start(torch.zeros(10**5))
        assert saver.ended(blocking=True) and saver.outcome() is None
        saver.start(torch.ones(10**5))
    assert seen.get_nowait()[0].sum().item() == 10**5
    with saving(lambda: None) as saver:
        saver.start()
        time.sleep(0.3)
    assert saver._code == 0 and "Traceback" not in capfd.readouterr().err


def test_one_that_is_killed() -> None:
    with saving(lambda: os.kill(os.getpid(), signal.SIGKILL)) as saver:
        saver.start()
        saver.copied()
        assert saver.ended(blocking=True)
        with pytest.raises(ChildProcessError, match="exit code -9"):
            saver.outcome()
    with saving(print) as saver:
        os.kill(saver._process, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="exit code -9"):
            for _ in range(2):  # the pipe may take the first
                saver.start(torch.ones(10**5))
                saver.copied()


def test_signals_to_stop_are_for_the_trainer() -> None:
    with saving(lambda: None) as saver:
        saver.start()
        saver.ended(blocking=True)
        saver.outcome()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(saver._process, number)
        saver.start()
        assert saver.ended(blocking=True) and saver.outcome() is None


def test_it_ends_with_its_trainer(tmp_path: Path) -> None:
    """Killed while it saves."""
    child = os.fork()
    if child == 0:
        saver = Saver(lambda: time.sleep(60), print)
        saver.start()
        (tmp_path / "pid").write_text(str(saver._process))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not running(pid):
            return
        time.sleep(0.05)
    raise AssertionError("it outlived its trainer")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_many_and_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one call of the kernel takes."""
    source = torch.randint(0, 255, (100_000,), dtype=torch.uint8)
    order = torch.randperm(10_000).tolist()
    blocks = [(source.data_ptr() + 10 * i, 10, 10 * n) for n, i in enumerate(order)]
    target = torch.zeros_like(source)
    other_memory.read_memory(os.getpid(), blocks, target.data_ptr())
    assert torch.equal(target.view(-1, 10), source.view(-1, 10)[order])
    monkeypatch.setattr(other_memory, "_BYTES", 30_001)
    target.zero_()
    whole = [(source.data_ptr(), 99_000, 1000), (source.data_ptr() + 99_000, 1000, 0)]
    other_memory.read_memory(os.getpid(), whole, target.data_ptr())
    assert torch.equal(target, source.roll(1000))
    with pytest.raises(OSError, match="process_vm_readv") as raised:
        other_memory.read_memory(os.getpid(), [(4096, 10, 0)], target.data_ptr())
    assert raised.value.errno == errno.EFAULT
