"""What may happen to a checkpoint's files: it is found before training goes on, and named."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from parallel.parity import Case
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import laid_out
from tests.distributed.test_layouts import trainer

TWO_RANKS = Case("dp2", data=2)
NEWEST = "iter_0000002"
REMEDY = "restore it, or set checkpoint.allow_previous=true"


def save(rank: int, world: int, runs: list[Path], seeds: list[int]) -> None:
    """Runs with checkpoints of steps 1 and 2."""
    for run, seed in zip(runs, seeds, strict=True):
        with laid_out(TWO_RANKS, world, f"run.seed={seed}") as (recipe, layout):
            running = trainer(recipe, layout, run)
            for _ in range(2):
                running._step()
                running.checkpointer.save(running.state)
            running.checkpointer.close()


def load(
    rank: int, world: int, runs: list[Path], allow_previous: bool, weights: Sequence[Path] = ()
) -> list[int | str]:
    """For each run the step it resumes at, or why it does not; then for each of some runs why
    its weights do not load as those of `checkpoint.load`, 0 if they do."""
    from recipes.errors import CheckpointError
    from train.weights import load_weights

    found: list[int | str] = []
    with laid_out(TWO_RANKS, world) as (recipe, layout):
        running = trainer(recipe, layout, runs[0])
        for run in runs:
            running.checkpointer.folder = run / "checkpoints"
            running.checkpointer.config.allow_previous = allow_previous
            try:
                found.append(
                    running.state.progress.step if running.checkpointer.load(running.state) else 0
                )
            except CheckpointError as error:
                found.append(str(error))
        for run in weights:
            try:
                load_weights(run, running.state)
                found.append(0)
            except CheckpointError as error:
                found.append(str(error))
    return found


def flip(file: Path, place: float) -> None:
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)


def harms(other_run: Path) -> dict[str, tuple[Callable[[Path], object], str]]:
    """Name -> (what is done to the newest checkpoint's folder, what the message must say)."""
    found: dict[str, tuple[Callable[[Path], object], str]] = {
        "a shard is missing": (lambda f: (f / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
        "a shard is cut": (lambda f: cut(f / "__1_0.distcp"), "__1_0.distcp has"),
        "a shard of another iteration": (
            lambda f: shutil.copy(f.with_name("iter_0000001") / "__0_0.distcp", f),
            "__0_0.distcp",
        ),
        "a shard of another run": (
            lambda f: shutil.copy(other_run / "checkpoints" / NEWEST / "__0_0.distcp", f),
            "__0_0.distcp",
        ),
        "metadata of another run": (
            lambda f: shutil.copy(other_run / "checkpoints" / NEWEST / "meta.json", f),
            "integrity.json is missing or not as it was saved",
        ),
        "latest points nowhere": (
            lambda f: (f.parent / "latest").write_text("iter_0000007\n"),
            "iter_0000007 is damaged (latest names it, and there is no such checkpoint)",
        ),
        "latest is empty": (lambda f: (f.parent / "latest").write_text(""), "latest names it"),
        "no checksums": (lambda f: (f / "integrity.json").unlink(), "integrity.json is missing"),
        "the folder has gone": (lambda f: shutil.rmtree(f), "there is no such checkpoint"),
    }
    files = ("__0_0.distcp", ".metadata", "metadata.json", "integrity.json", "meta.json")
    for name in files:
        for place in (0.0, 0.31, 0.77, 1.0):
            found[f"a bit of {name} at {place:.0%}"] = (
                lambda f, name=name, place=place: flip(f / name, place),  # type: ignore[misc]
                name,
            )
        found[f"{name} is cut"] = (lambda f, name=name: cut(f / name), name)  # type: ignore[misc]
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of other seeds."""
    folder = tmp_path_factory.mktemp("saved")
    runs = [folder / "one", folder / "other"]
    for run in runs:
        (run / "checkpoints").mkdir(parents=True)
    run_distributed(save, 2, runs, [1234, 7])
    return runs


def test_damage_is_named_and_the_one_before_is_used_when_allowed(
    saved: list[Path], tmp_path: Path
) -> None:
    one, other = saved
    cases = harms(other)
    runs = []
    for i, (harm, _) in enumerate(cases.values()):
        runs.append(tmp_path / str(i))
        shutil.copytree(one, runs[-1])
        harm(runs[-1] / "checkpoints" / NEWEST)
    flipped = tmp_path / "flipped"
    shutil.copytree(one, flipped)
    flip(flipped / "checkpoints" / NEWEST / "__1_0.distcp", 0.6)
    # One process loads all: each is a start of many seconds.
    (*refused, whole, weights), _ = run_distributed(load, 2, runs, False, [one, flipped])
    assert whole == 0
    assert weights == (
        f"checkpoint.load={flipped} is damaged (__1_0.distcp is not what was saved: its checksum "
        "differs); restore it"
    )
    for (case, (_, words)), message in zip(cases.items(), refused, strict=True):
        assert isinstance(message, str), f"{case}: loaded step {message}"
        assert " is damaged (" in message and words in message and REMEDY in message, (
            case,
            message,
        )
        assert "\n" not in message, case
    allowed = [2 if case.startswith("latest") else 1 for case in cases]
    assert run_distributed(load, 2, runs, True) == [allowed] * 2


def test_what_a_kill_leaves_is_no_damage(saved: list[Path], tmp_path: Path) -> None:
    run, unnamed = tmp_path / "run", tmp_path / "unnamed"
    for copy in (run, unnamed):
        shutil.copytree(saved[0], copy)
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / NEWEST, checkpoints / "iter_0000003")
    (checkpoints / "iter_0000003/meta.json").unlink()
    (checkpoints / "latest.tmp").write_text("iter_00")
    (checkpoints / NEWEST / "meta.json.tmp").write_text("{")
    (unnamed / "checkpoints/latest").unlink()
    assert run_distributed(load, 2, [run, unnamed], False) == [[2, 2]] * 2
