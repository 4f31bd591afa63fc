"""metrics.jsonl and TensorBoard after kills, resumes and rollbacks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.errors import DataError
from recipes.schema import LoggingConfig
from train.metrics import MetricsFile, Reporter

QUIET = LoggingConfig(progress=False, tensorboard=True)


def record(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "mtp_loss": [loss + 1, loss + 2], "tokens_per_second": 1.0}


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()["scalars"]}


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', '{"step": 4, "loss": 1.0}', ""])
def test_a_cut_last_line_is_dropped(cut: str, tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append(record(step, float("nan")))
    with file.path.open("a") as stream:
        stream.write(cut)  # without its end of line it may be half a number
    assert [r["step"] for r in file.read()] == [1, 2, 3]
    file.truncate_after(2)
    file.append(record(3, 7.0))
    lines = [json.loads(x) for x in file.path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in lines] == [(1, None), (2, None), (3, 7.0)]


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "[]", '{"loss": 1.0}'])
def test_a_damaged_line_is_named_and_nothing_is_lost(line: str, tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    before = file.path.read_text()
    for act in (file.read, lambda: file.truncate_after(1)):
        with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is no record"):
            act()
    assert file.path.read_text() == before


def test_a_rollback_leaves_one_value_a_step(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, QUIET, True, {}, first_step=0, last_step=6)
    for step in (1, 2, 3, 4, 5):
        reporter.step(record(step, step))
    reporter.rewind(3)
    for step in (4, 5, 6):
        reporter.step(record(step, 10 * step))
    reporter.close()
    expected = [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]
    assert [(r["step"], r["loss"]) for r in MetricsFile(tmp_path / "metrics.jsonl").read()] == (
        expected
    )
    assert shown(tmp_path)["loss"] == expected
    assert shown(tmp_path)["mtp_loss/2"] == [(s, v + 2) for s, v in expected]


KILLED = """
import os, sys
from pathlib import Path
from recipes.errors import DataError
from recipes.schema import LoggingConfig
from tests.unit.test_metrics import QUIET, record
from train.metrics import Reporter

reporter = Reporter(Path(sys.argv[1]), QUIET, True, {}, 0, 9)
for step in (1, 2, 3):
    reporter.step(record(step, step))
reporter.sync()
os.kill(os.getpid(), 9)
"""


def test_what_a_checkpoint_made_final_survives_a_kill(tmp_path: Path) -> None:
    """TensorBoard's writer alone would keep it in memory for two minutes."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False
    )
    assert killed.returncode == -9
    time.sleep(1)  # TensorBoard orders files by the second they were begun; a start takes longer
    reporter = Reporter(tmp_path, QUIET, True, {}, first_step=3, last_step=9)
    reporter.step(record(4, 4))
    reporter.close()
    assert shown(tmp_path)["loss"] == [(1, 1), (2, 2), (3, 3), (4, 4)]
