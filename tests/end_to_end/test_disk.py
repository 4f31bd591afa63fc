"""Disks that are full or cannot be written, with a real file system."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.end_to_end.training import STEPS, essence, records, train, tree, wait_for_step

if TYPE_CHECKING:
    from tests.end_to_end.conftest import SmallDisk


def latest(run: Path) -> str:
    return (run / "checkpoints/latest").read_text().strip()


def test_a_full_disk_costs_no_checkpoint(
    data: Path, straight: Path, small_disk: "SmallDisk"
) -> None:
    run = small_disk.folder / "run"
    command = train(data, run, "checkpoint.save_interval=4")
    message = command.refused()
    assert f"iter_0000008 was not saved: run.dir={run}: No space left on device" in message
    assert "free some space and start again" in message
    assert latest(run) == "iter_0000004"
    assert not (run / "checkpoints/iter_0000008").exists()  # it would only fill the disk
    small_disk.remount("size=64m")
    assert "resumed at step 4" in command.run()
    assert essence(records(run)) == essence(records(straight))
    small_disk.remount("ro")
    before = tree(run)
    message = train(data, run, f"stage.train_steps={STEPS + 1}").refused()
    assert f"run.dir={run}: Read-only file system; choose a directory you can write" in message
    assert tree(run) == before


@pytest.mark.slow
def test_a_failed_background_write_ends_every_rank(data: Path, small_disk: "SmallDisk") -> None:
    run = small_disk.folder / "run"
    message = train(
        data,
        run,
        "checkpoint.save_interval=4",
        "checkpoint.async_save=true",
        "parallel.data_parallel_size=2",
    ).refused(timeout=60)
    assert f"iter_0000008 was not saved: run.dir={run}: No space left on device" in message
    assert latest(run) == "iter_0000004"


@pytest.mark.slow
def test_a_disk_that_fills_while_metrics_are_written(data: Path, small_disk: "SmallDisk") -> None:
    run = small_disk.folder / "run"
    process = train(data, run, "stage.train_steps=100000").start()
    wait_for_step(process, run, 2)
    filler = (small_disk.folder / "filler").open("wb")
    try:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    except OSError:
        pass
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert f"run.dir={run}: No space left on device; free some space" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert [r["step"] for r in records(run)] == list(range(1, len(records(run)) + 1))
