"""A loss that is not a number, for real, under each policy."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.training import SMALL, Command, records, sources

STEPS = 8


def poisoned(data: Path, run: Path, steps: str, *overrides: str, kind: str = "loss") -> Command:
    recipe = [*SMALL, sources(data), f"run.dir={run}", f"stage.train_steps={STEPS}", *overrides]
    return Command([kind, steps, *recipe], data, "tests.end_to_end.poisoned_train")


def bad_steps(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "bad_steps.json").read_text())


def test_stop_saves_the_last_good_state_and_a_mended_run_goes_on(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    output = poisoned(data, run, "5").run(code=4)
    assert "step 5: loss nan" in output and "bad_steps.json" in output
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4]
    assert (run / "checkpoints/latest").read_text().strip() == "iter_0000004"
    (bad,) = bad_steps(run)
    assert bad["first_sample"] == 16 and bad["action"] == "stop"
    assert len(bad["documents"]) == 4
    assert all(path.endswith("code/train") and ids for path, ids in bad["documents"])
    # Nothing is poisoned this time: the batch that was dropped is trained on.
    poisoned(data, run, "1000").run()
    assert [r["step"] for r in records(run)] == list(range(1, STEPS + 1))
    assert all(r["updated"] for r in records(run))


@pytest.mark.slow
def test_a_gradient_alone_on_one_rank_is_decided_by_all(data: Path, tmp_path: Path) -> None:
    """The loss is finite everywhere and rank 1 has seen nothing bad."""
    two_ranks = ("parallel.data_parallel_size=2", "stage.micro_batch_size=1")
    ends: dict[str, Any] = {}
    for action, more in (
        ("skip", ()),
        ("rollback", ("checkpoint.save_interval=4", "checkpoint.async_save=true")),
        ("stop", ()),
    ):
        run = tmp_path / action
        command = poisoned(
            data, run, "5", f"guard.non_finite={action}", *two_ranks, *more, kind="gradient"
        )
        command.run(code=4 if action == "stop" else 0)
        (bad,) = bad_steps(run)
        assert (bad["step"], bad["action"], bad["grad_norm"]) == (5, action, "nan")
        assert float(bad["loss"]) > 0
        first, second = json.loads((run / "ranks.json").read_text())
        assert first == second
        ends[action] = records(run)
    for action in ("skip", "rollback"):
        lines = ends[action]
        assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
        assert [r["updated"] for r in lines] == [s != 5 for s in range(1, STEPS + 1)]
        assert lines[3]["params_hash"] == lines[4]["params_hash"] != lines[5]["params_hash"]
        assert lines[4]["grad_norm"] is None
    # To skip an update and to pass its batch by is the same, with nothing else to remember.
    assert [r["params_hash"] for r in ends["skip"]] == [r["params_hash"] for r in ends["rollback"]]
    assert [r["step"] for r in ends["stop"]] == [1, 2, 3, 4]
    assert ends["stop"][3]["params_hash"] == ends["skip"][3]["params_hash"]


def test_a_loss_on_one_rank_is_skipped_by_all(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    two_ranks = ("parallel.data_parallel_size=2", "stage.micro_batch_size=1")
    poisoned(data, run, "5", "guard.non_finite=skip", *two_ranks).run()
    lines = records(run)
    assert [r["updated"] for r in lines] == [s != 5 for s in range(1, STEPS + 1)]
    assert lines[4]["loss"] is None
    assert lines[3]["params_hash"] == lines[4]["params_hash"] != lines[5]["params_hash"]
    first, second = json.loads((run / "ranks.json").read_text())
    assert first == second


def test_rollback_goes_back_and_never_sees_the_batch_again(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    poisoned(data, run, "5", "guard.non_finite=rollback", "checkpoint.save_interval=3").run()
    lines = records(run)
    assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
    assert [r["updated"] for r in lines] == [s != 5 for s in range(1, STEPS + 1)]
    assert bad_steps(run)[0]["action"] == "rollback"


@pytest.mark.slow
def test_a_rollback_with_nothing_to_go_back_to_is_a_stop(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("guard.non_finite=rollback", "checkpoint.save_interval=4")
    output = poisoned(data, run, "3", *more).run(code=4)
    assert "step 3: loss nan" in output and ": stop;" in output
    assert [r["step"] for r in records(run)] == [1, 2]
    assert (run / "checkpoints/latest").read_text().strip() == "iter_0000002"


@pytest.mark.slow
def test_too_many_bad_steps_stop_the_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    poisoned(data, run, "2,3", "guard.non_finite=skip", "guard.max_non_finite=1").run(code=4)
    assert [r["step"] for r in records(run)] == [1, 2]


@pytest.mark.parametrize("action", ["ignore", "Stop"])
def test_unknown_policies_are_refused(action: str, data: Path, tmp_path: Path) -> None:
    output = poisoned(data, tmp_path / "run", "1", f"guard.non_finite={action}").run(code=2)
    assert f"guard.non_finite={action}" in output and "rollback" in output
