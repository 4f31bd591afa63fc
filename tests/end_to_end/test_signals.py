"""Signals at the worst moment: while a checkpoint is being written."""

import signal
from pathlib import Path

import pytest

from tests.end_to_end.training import Command, end_with, essence, records, train, wait_for_step

SAVE = 4


def signalled(signals: str, data: Path, run: Path, *overrides: str) -> Command:
    recipe = train(data, run, f"checkpoint.save_interval={SAVE}", *overrides).overrides
    return Command([signals, *recipe], data, "tests.end_to_end.signalled_train")


@pytest.mark.parametrize(
    ("signals", "background"),
    [pytest.param("TERM,TERM,USR1", False, marks=pytest.mark.slow), ("TERM,INT", True)],
)
def test_a_signal_while_saving_loses_neither_checkpoint_nor_step(
    signals: str, background: bool, data: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = f"checkpoint.async_save={str(background).lower()}"
    signalled(signals, data, run, more).run(code=3)
    last = len(records(run))
    # In the background training has gone on when the signal comes.
    assert last >= SAVE if background else last == SAVE
    assert (run / "checkpoints/latest").read_text().strip() == f"iter_{last:07d}"
    if background:  # both runs end alike; one is enough to go on with
        assert f"resumed at step {last}" in train(data, run, more).run()
        assert essence(records(run)) == essence(records(straight))


def test_a_second_interrupt_ends_at_once(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = signalled("INT,INT", data, run).run(code=130)
    assert "Traceback" not in output
    assert "interrupted; the same command goes on from what was saved" in output
    assert not (run / "checkpoints/latest").exists()  # the save was cut short


def test_an_interrupt_reaches_every_rank_once(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = train(data, run, "parallel.data_parallel_size=2", "stage.train_steps=1000").start()
    wait_for_step(process, run, 2)
    end_with(process, signal.SIGINT, code=3)
    last = len(records(run))
    assert (run / "checkpoints/latest").read_text().strip() == f"iter_{last:07d}"
