"""A save that is killed, before each thing it does to the disk: the last completed checkpoint is
whole, the next start finds it by itself, and trains the same bits.

The state, the training, the writing and the loading are the real ones; the processes die of
SIGKILL, in the background the trainer together with its writer.
"""

import json
import mmap
import os
import resource
import signal
import struct
import sys
import threading
from collections.abc import Callable
from itertools import batched
from pathlib import Path
from typing import Any

import pytest

from parallel.parity import REFERENCE, Case
from tests.distributed.harness import RankError, run_distributed
from tests.distributed.layouts import laid_out
from tests.distributed.test_layouts import trainer

TWO_RANKS = Case("dp2", data=2)
NEVER = 10**6
"""Number of an event that no run comes to."""
LAST = 4
"""Steps of the whole run, with a checkpoint after each."""

PHASES = {
    "make the folder": "mkdir iter_*",
    "open a shard": "open *.distcp",
    "sync a shard": "fsync *.distcp",
    "between shards and metadata": "open .metadata.tmp",
    "name the metadata": "rename .metadata.tmp",
    "write the checksums": "open integrity.json",
    "between sync and completion": "open meta.json.tmp",
    "between sync and rename": "rename meta.json.tmp",
    "before latest": "open latest.tmp",
    "move latest": "rename latest.tmp",
    "after latest": "remove meta.json",
    "while deleting an old one": "remove *.distcp",
    "at the end of a deletion": "rmdir iter_*",
}
"""What is killed -> the event before which it is."""


class Executioner:
    """Kills this process, and the trainer if this is its writer, before the event of a number.

    Events are what is done to files below a folder: open for writing, sync, rename, remove, make.
    """

    def __init__(self, folder: Path, event: int | None, log: Path) -> None:
        self._folder, self._event, self._trainer = f"{folder}/", event, os.getpid()
        self._count = mmap.mmap(-1, 8)  # shared with a forked writer
        self._one_at_a_time = threading.Lock()  # a rank writes two shards side by side
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(self._audit)
        sync: Callable[[int], None] = os.fsync

        def counted(descriptor: int) -> None:
            self._note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            sync(descriptor)

        os.fsync = counted  # type: ignore[assignment]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        kind = event.removeprefix("os.")
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._note("open", arguments[0])
        elif event.startswith("os.") and kind in ("mkdir", "rename", "remove", "rmdir"):
            where = arguments[-1]
            if kind in ("remove", "rmdir") and isinstance(where, int) and where >= 0:
                self._note(kind, f"{os.readlink(f'/proc/self/fd/{where}')}/{arguments[0]}")
            else:
                self._note(kind, arguments[0])

    def _note(self, kind: str, path: Any) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not text.startswith(self._folder):
            return
        with self._one_at_a_time:
            (count,) = struct.unpack("q", self._count[:8])
            self._count[:8] = struct.pack("q", count + 1)
            os.write(self._log, f"{kind} {Path(text).name}\n".encode())
            if count == self._event:
                os.kill(self._trainer, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)


def keep_saving(
    rank: int,
    world: int,
    run: Path,
    background: bool,
    event: int | None,
    limit: int | None,
    victim: int = 0,
) -> list[tuple[int, str]]:
    """Load, then train to the last step with a checkpoint after each; (step, hash) as it goes.

    Args:
        event: die before this event; None: do not.
        limit: die when a file grows beyond so many bytes; None: do not.
        victim: the rank whose events count and that dies.
    """
    from train.hashes import parameters_hash

    with laid_out(REFERENCE if world == 1 else TWO_RANKS, world) as (recipe, layout):
        if event is not None:  # before the process that saves is forked, which is killed too
            mine = event if rank == victim else None
            Executioner(run / "checkpoints", mine, run / f"events{rank}")
        running = trainer(recipe, layout, run, async_save=background, keep_last=1)
        state, found = running.state, []
        running.checkpointer.load(state)
        found.append((state.progress.step, parameters_hash(state.chunks)))
        if rank == 0:
            (run / "loaded").write_text(json.dumps(found[0]))
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        while state.progress.step < LAST:
            running._step()
            found.append((state.progress.step, parameters_hash(state.chunks)))
            running.checkpointer.save(state)
            running.checkpointer.poll()
        running.checkpointer.close()
    return found


def killed(
    run: Path,
    background: bool,
    event: int | None = None,
    limit: int | None = None,
    world: int = 1,
    victim: int = 0,
) -> str:
    """Start once and be killed; the event it came to, or "" if it came to the end."""
    for rank in range(world):
        (run / f"events{rank}").unlink(missing_ok=True)
    try:
        run_distributed(keep_saving, world, run, background, event, limit, victim)
    except RankError as error:
        number = signal.SIGKILL if limit is None else signal.SIGXFSZ
        assert f"exit code {-number}" in str(error), error
        return events(run, victim)[-1] if event is not None else "limit"
    return ""


def events(run: Path, rank: int = 0) -> list[str]:
    """What a rank did to the checkpoints in the last start, in order."""
    return (run / f"events{rank}").read_text().splitlines()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Step -> hash of a run nothing happened to."""
    run = new_run(tmp_path_factory.mktemp("undisturbed"))
    return dict(run_distributed(keep_saving, 1, run, False, None, None)[0])


def new_run(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    return folder


def latest(run: Path) -> int:
    """Step of the last completed checkpoint."""
    file = run / "checkpoints/latest"
    return int(file.read_text().removeprefix("iter_")) if file.exists() else 0


def check_loaded(run: Path, completed: int, undisturbed: dict[int, str]) -> None:
    """The last start found the last completed checkpoint, or a whole one not named yet."""
    step, bits = json.loads((run / "loaded").read_text())
    assert step >= completed
    assert undisturbed[step] == bits


def check_end(run: Path, background: bool, undisturbed: dict[int, str], world: int = 1) -> None:
    """Left alone it comes to the same end, and leaves one checkpoint and nothing else."""
    ends = run_distributed(keep_saving, world, run, background, None, None)[0]
    assert dict(ends).items() <= undisturbed.items() and ends[-1][0] == LAST
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == [f"iter_{LAST:07d}", "latest"]


def events_of(run: Path, background: bool) -> list[str]:
    """Everything a whole run of one rank does to its checkpoints, in order."""
    assert killed(new_run(run), background, event=NEVER) == ""
    return events(run)


def matches(event: str, pattern: str) -> bool:
    return Path(event).match(pattern)


def numbers(events: list[str], pattern: str) -> list[int]:
    return [i for i, event in enumerate(events) if matches(event, pattern)]


@pytest.mark.parametrize("background", [pytest.param(False, marks=pytest.mark.slow), True])
def test_killed_at_chosen_phases(
    background: bool, tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    counted = events_of(tmp_path / "counted", background)
    for name, pattern in PHASES.items():
        assert numbers(counted, pattern), f"nothing to kill: {name}; events: {set(counted)}"
    chosen = ("sync a shard", "before latest", "while deleting an old one")
    run = new_run(tmp_path / "run")
    for name in chosen if background else reversed(chosen):
        completed = latest(run)
        # The second time, so that there is something to lose; counted from this start's first.
        place = numbers(counted, PHASES[name])[1 if name != "while deleting an old one" else 0]
        killed(run, background, event=place)
        check_loaded(run, completed, undisturbed)
    check_end(run, background, undisturbed)


EACH_PHASE = [(name, victim) for name in PHASES for victim in (0, 1)]


@pytest.mark.parametrize(
    ("background", "kills"),
    [
        (True, [("sync a shard", 1), ("before latest", 0)]),
        pytest.param(True, EACH_PHASE, marks=pytest.mark.slow),
        pytest.param(False, EACH_PHASE, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1800)
def test_one_of_two_ranks_is_killed(
    background: bool, kills: list[tuple[str, int]], tmp_path: Path
) -> None:
    """Both write a shard; the first does all the rest. In the background their writers do."""
    whole = new_run(tmp_path / "whole")
    undisturbed = dict(run_distributed(keep_saving, 2, whole, background, NEVER, None)[0])
    places = {kill: numbers(events(whole, kill[1]), PHASES[kill[0]]) for kill in kills}
    assert any(places[kill] for kill in kills if kill[1] == 1)
    for i, some in enumerate(batched([kill for kill in kills if places[kill]], 2)):
        run = new_run(tmp_path / f"run{i}")
        for kill in some:
            completed = latest(run)
            # In the second save of a start, so that there is something to lose.
            place = places[kill][len(places[kill]) // LAST]
            assert killed(run, background, place, world=2, victim=kill[1]), kill
            check_loaded(run, completed, undisturbed)
        assert latest(run) > 0
        check_end(run, background, undisturbed, world=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some hundred starts
@pytest.mark.parametrize("background", [False, True])
def test_killed_before_each_event(
    background: bool, tmp_path: Path, undisturbed: dict[int, str]
) -> None:
    """Each of two saves, the deletion of an old one among them, in one or more starts of a run."""
    counted = events_of(tmp_path / "counted", background)
    first_deleted = numbers(counted, PHASES["at the end of a deletion"])[0]
    seen = set()
    for event in range(first_deleted + 3):
        run = new_run(tmp_path / f"run{event}")
        seen.add(killed(run, background, event=event))
        completed = latest(run)
        killed(run, background, event=2)
        check_loaded(run, completed, undisturbed)
        check_end(run, background, undisturbed)
    for name, pattern in PHASES.items():
        assert any(matches(event, pattern) for event in seen), f"not killed: {name}"


@pytest.mark.slow
def test_killed_in_the_middle_of_a_file(tmp_path: Path, undisturbed: dict[int, str]) -> None:
    """By the kernel, when a file grows beyond a limit: at the first byte, within a record, ..."""
    counted = events_of(tmp_path / "counted", False)
    whole = max(p.stat().st_size for p in (tmp_path / "counted").rglob("*.distcp"))
    run = new_run(tmp_path / "run")
    killed(run, False, event=numbers(counted, PHASES["move latest"])[1])
    for share in (0.0, 0.001, 0.3, 0.7, 0.999):
        completed = latest(run)
        assert killed(run, False, limit=int(share * whole)) == "limit"
        check_loaded(run, completed, undisturbed)
    check_end(run, False, undisturbed)
