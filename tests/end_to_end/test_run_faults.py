"""What can happen to a rank: all ranks end within a bounded time, with one message and exit code,
and the same command goes on bit for bit."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.training import (
    Command,
    essence,
    records,
    sources,
    train,
    wait_for_step,
)

TWO_RANKS = ("parallel.data_parallel_size=2", "checkpoint.save_interval=2")
EACH_SAVER = pytest.mark.parametrize(
    "layout",
    [pytest.param((), id="1 rank", marks=pytest.mark.slow), pytest.param(TWO_RANKS, id="2")],
)
LOST = 6


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "two"
    train(data, run, *TWO_RANKS).run()
    return run


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that a command has started, by rank."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children}


def ended(process: subprocess.Popen[str], seconds: float) -> list[str]:
    """Wait for a command that lost a rank; its error messages."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == LOST, f"exit code {process.returncode}:\n{output}"
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if "Error: " in line]


def goes_on(command: Command, run: Path, undisturbed: Path) -> None:
    """The same command ends the run, with the same bits."""
    assert "resumed at step" in command.run()
    assert essence_of(run) == essence_of(undisturbed)


def essence_of(run: Path) -> list[dict[str, object]]:
    """But what was sent: the first step of a start also sets the groups up."""
    return [{k: v for k, v in r.items() if k != "wire"} for r in essence(records(run))]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank(rank: int, data: Path, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    command = train(data, run, *TWO_RANKS)
    process = command.start()
    wait_for_step(process, run, 3)
    ranks_of(process)[rank].kill()
    (message,) = ended(process, 30)
    assert message == (
        f"LostRankError: rank {rank} was ended by SIGKILL; see {run}/logs; "
        "the same command goes on from the last checkpoint"
    )
    goes_on(command, run, undisturbed)


@EACH_SAVER
def test_a_killed_writer(layout: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    """The process that saves in the background of the last rank."""
    run = tmp_path / "run"
    saves = ("checkpoint.async_save=true", "checkpoint.save_interval=10", "stage.train_steps=30")
    command = train(data, run, *saves, *layout)
    process = command.start()
    while not (run / "checkpoints/latest").exists():
        assert process.poll() is None
        time.sleep(0.05)
    last = ranks_of(process)[1] if layout else psutil.Process(process.pid)
    (writer,) = last.children()
    writer.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in output, output
    (message,) = [line for line in output.splitlines() if "Error: " in line]
    assert "was not saved: the process that wrote it died" in message
    assert "the last checkpoint is intact" in message
    assert "resumed at step" in command.run()


@EACH_SAVER
def test_an_error_loses_no_save_in_the_background(
    layout: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    saves = ("checkpoint.async_save=true", "checkpoint.save_interval=2")
    words = ["4", *train(data, run, *saves, *layout).overrides]
    message = Command(words, data, "tests.end_to_end.failing_train").refused()
    assert "the data is gone" in message
    assert (run / "checkpoints/latest").read_text() == "iter_0000004\n"


def test_a_hung_rank(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = train(data, run, *TWO_RANKS, "guard.progress_timeout_minutes=0.2").overrides
    process = Command(["1", "4", *recipe], data, "tests.end_to_end.hung_train").start()
    wait_for_step(process, run, 3)
    (message,) = ended(process, 60)
    assert f"{run}/logs; the same command goes on from the last checkpoint" in message
    waiting, hung = [(run / f"logs/rank{rank}.log").read_text() for rank in (0, 1)]
    said = "no progress for 0.2 minutes (guard.progress_timeout_minutes) since a micro batch of"
    assert said in hung and "wait_for_a_disk_that_never_answers" in hung
    if said in message:  # else rank 1 was gone before rank 0 had waited so long
        assert said in waiting and "all stacks:" in waiting
    else:
        assert "Traceback" in waiting
    assert "run_schedule" in waiting and "never_answers" not in waiting


@pytest.mark.slow
def test_a_rank_that_hangs_before_it_trains(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = train(data, run, *TWO_RANKS, "parallel.timeout_minutes=0.5").overrides
    process = Command(["1", "0", *recipe], data, "tests.end_to_end.hung_train").start()
    (message,) = ended(process, 120)
    hung = (run / "logs/rank1.log").read_text()
    said = "no progress for 0.45 minutes (parallel.timeout_minutes) since building and loading"
    assert said in hung and "wait_for_a_disk_that_never_answers" in hung
    assert f"{run}/logs; the same command goes on from the last checkpoint" in message


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank(rank: int, data: Path, tmp_path: Path, undisturbed: Path) -> None:
    """It cannot even write its stacks."""
    run = tmp_path / "run"
    command = train(data, run, *TWO_RANKS, "guard.progress_timeout_minutes=0.2")
    process = command.start()
    wait_for_step(process, run, 3)
    ranks_of(process)[rank].send_signal(signal.SIGSTOP)
    (message,) = ended(process, 60)
    if rank == 0:
        assert "rank 1 ended with exit code 6, rank 0 did not end by itself" in message
    else:
        assert "no progress for 0.2 minutes" in message
    assert "run_schedule" in (run / f"logs/rank{1 - rank}.log").read_text()
    goes_on(command, run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_data_that_is_lost(harm: str, data: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The file is put back before the run goes on."""
    own, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data / "code", own / "code")
    shutil.copytree(data, own, dirs_exist_ok=True)
    (old,) = [o for o in train(data, run).overrides if o.startswith("data.sources=")]
    more = ("data.prepare_if_missing=false", f"data.sources={sources(own).split('=', 1)[1]}")
    command = train(own, run, *TWO_RANKS, *more)
    assert old not in more
    process = command.start()
    wait_for_step(process, run, 3)
    file = next(own.rglob("train.bin"))
    kept = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        with file.open("r+b") as stream:
            stream.truncate(len(kept) // 2)
    output, _ = process.communicate(timeout=40)
    messages = [line for line in output.splitlines() if "Error: " in line]
    assert len(messages) == 1 and "Traceback" not in output, output
    if process.returncode == LOST:  # the cut was found by reading across it
        assert "was ended by SIGBUS" in messages[0]
    else:
        assert process.returncode == 2 and f"DataError: {file}: " in messages[0], output
    assert "DataError: " in command.refused()
    file.write_bytes(kept)
    goes_on(command, run, undisturbed)


@pytest.mark.slow
def test_two_commands_in_one_directory(data: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = train(data, run, "checkpoint.save_interval=2")
    first = command.start()
    wait_for_step(first, run, 3)
    first.send_signal(signal.SIGSTOP)
    message = command.refused()
    assert f"run.dir={run} is in use by process {first.pid} on " in message
    assert "wait until that has ended" in message
    first.kill()
    first.wait()
    assert "resumed at step" in command.run()
    assert essence(records(run)) == essence(records(straight))
