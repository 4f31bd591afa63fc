"""`python -m tests.end_to_end.failing_train STEP OVERRIDES...`: training that meets an error
after a step, while a copy of the state for a save in the background takes two seconds; everything
else is the real command."""

import sys
import time
from typing import Any

from recipes.compose import run_cli
from recipes.errors import DataError
from recipes.schema import Recipe


def main(recipe: Recipe) -> int:
    from train import run, saver, trainer

    step, read = trainer.Trainer._step, saver.read_memory

    def failing(self: Any) -> Any:
        if self.state.progress.step == _STEP:
            raise DataError("the data is gone")
        return step(self)

    def late(*arguments: Any) -> None:
        time.sleep(2)
        read(*arguments)

    trainer.Trainer._step = failing  # type: ignore[method-assign]
    saver.read_memory = late  # type: ignore[assignment]
    return run.run(recipe)


if __name__ == "__main__":
    _STEP = int(sys.argv.pop(1))
    run_cli(main, "tests.end_to_end.failing_train")
