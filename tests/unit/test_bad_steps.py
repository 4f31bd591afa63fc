"""bad_steps.json across kills: each step that was dropped is there once, no other."""

import json
from pathlib import Path

from train.guards import BadStep, BadSteps


def bad(step: int, action: str) -> BadStep:
    return BadStep(step, 4 * step - 4, "nan", "nan", action, [["code/train", [step]]])


def reopened(folder: Path, done: int) -> BadSteps:
    """What a run sees that resumes after `done` steps."""
    return BadSteps(folder, done)


def test_a_skip_that_is_done_again_counts_once(tmp_path: Path) -> None:
    steps = reopened(tmp_path, 0)
    steps.add(bad(2, "skip"), write=True)
    steps.add(bad(5, "skip"), write=True)
    # Killed; the checkpoint is of step 4, so step 5 comes again and is bad again.
    steps = reopened(tmp_path, 4)
    assert steps.survived == 1
    steps.add(bad(5, "skip"), write=True)
    assert steps.survived == 2
    assert [s["step"] for s in json.loads(steps.path.read_text())] == [2, 5]


def test_a_rollback_is_remembered_by_the_run_it_sent_back(tmp_path: Path) -> None:
    reopened(tmp_path, 0).add(bad(5, "rollback"), write=True)
    # Killed while it loads the checkpoint of step 3.
    steps = reopened(tmp_path, 3)
    assert steps.survived == 1
    assert [s for s in range(1, 9) if steps.must_skip(s)] == [5]


def test_a_kill_while_it_is_written_leaves_the_old_file(tmp_path: Path) -> None:
    steps = reopened(tmp_path, 0)
    steps.add(bad(2, "skip"), write=True)
    (tmp_path / "bad_steps.json.tmp").write_text('[{"step": 2')
    assert reopened(tmp_path, 2).steps == steps.steps
    steps.add(bad(3, "skip"), write=True)
    assert [s.step for s in reopened(tmp_path, 3).steps] == [2, 3]


def test_only_one_rank_writes(tmp_path: Path) -> None:
    steps = reopened(tmp_path, 0)
    steps.add(bad(2, "rollback"), write=False)
    assert steps.must_skip(2) and not steps.path.exists()
