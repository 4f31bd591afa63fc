"""Which checkpoints stay on the disk."""

from pathlib import Path

import pytest

from recipes.schema import CheckpointConfig
from train.checkpoint import META, Checkpointer


def kept(
    folder: Path, newest: int, complete: list[int], unfinished: list[int], config: CheckpointConfig
) -> list[int]:
    """Steps that are left when the checkpoint of step `newest` has become the latest."""
    for step in complete + unfinished:
        path = folder / "checkpoints" / f"iter_{step:07d}"
        path.mkdir(parents=True)
        (path / "__0_0.distcp").write_text("bytes")
        if step in complete:
            (path / META).write_text("{}")
    # Copies that users made neither count nor go, nor stop a save.
    copies = {f"iter_{complete[0]:07d}.bak", f"iter_{complete[0]:07d}_mine", "iter_final"}
    for name in copies:
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / META).write_text("{}")
    checkpointer = Checkpointer(folder / "checkpoints", config, lambda n: "", print)
    checkpointer._retain(newest)
    checkpointer.close()
    left = {p.name for p in (folder / "checkpoints").iterdir()}
    assert copies <= left
    return sorted(int(name.split("_")[1]) for name in left - copies)


@pytest.mark.parametrize(
    ("newest", "complete", "unfinished", "keep_last", "keep_every", "expected"),
    [
        (50, [10, 20, 30, 40, 50], [], 2, None, [40, 50]),
        (50, [10, 20, 30, 40, 50], [], 2, 20, [20, 40, 50]),
        (50, [10, 20, 30, 40, 50], [], None, None, [10, 20, 30, 40, 50]),
        (50, [10, 20, 50], [30], None, None, [10, 20, 50]),
        # A save that a kill cut short is no checkpoint: it must not push out a whole one.
        (70, [50, 70], [100], 2, None, [50, 70]),
        # Damaged ones that checkpoint.allow_previous went back from neither count nor go.
        (8, [4, 6, 8, 12], [], 2, None, [6, 8, 12]),
    ],
)
def test_retention(
    tmp_path: Path,
    newest: int,
    complete: list[int],
    unfinished: list[int],
    keep_last: int | None,
    keep_every: int | None,
    expected: list[int],
) -> None:
    config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every)
    assert kept(tmp_path, newest, complete, unfinished, config) == expected
