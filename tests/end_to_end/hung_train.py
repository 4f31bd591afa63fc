"""`python -m tests.end_to_end.hung_train RANK STEP OVERRIDES...`: training in which a rank never
gets a batch of a step (0: its checkpoint); everything else is the real command."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from recipes.compose import run_cli
from recipes.schema import Recipe


def main(recipe: Recipe) -> int:
    from train import batches, checkpoint, run

    load = checkpoint.Checkpointer.load

    def hanging_load(self: Any, state: Any) -> bool:
        if (0, os.environ.get("RANK")) == (_STEP, _RANK):
            wait_for_a_disk_that_never_answers()
        return load(self, state)

    checkpoint.Checkpointer.load = hanging_load  # type: ignore[method-assign]
    original = batches.Batches.train_from

    def hanging(self: Any, step: int) -> Iterator[Any]:
        for i, batch in enumerate(original(self, step)):  # a rank has one micro batch a step
            if (step + i + 1, os.environ.get("RANK")) == (_STEP, _RANK):
                wait_for_a_disk_that_never_answers()
            yield batch

    batches.Batches.train_from = hanging  # type: ignore[method-assign]
    return run.run(recipe)


def wait_for_a_disk_that_never_answers() -> None:
    time.sleep(10_000)


if __name__ == "__main__":
    _RANK, _STEP = sys.argv.pop(1), int(sys.argv.pop(1))
    run_cli(main, "tests.end_to_end.hung_train")
