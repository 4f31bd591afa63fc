"""`python -m tests.end_to_end.poisoned_train STEPS OVERRIDES...`: training whose loss is NaN at
some steps (`5` or `2,3`), on one rank; everything else is the real command."""

import os
import sys
from typing import Any

from recipes.compose import run_cli
from recipes.schema import Recipe


def main(recipe: Recipe) -> int:
    from train import run

    original = run.train

    def start(*arguments: Any) -> int:
        from train import trainer  # imports Megatron, so not before the backends are in place

        trainer.forward_step = _poison(trainer.forward_step)
        return original(*arguments)

    run.train = start  # type: ignore[assignment]
    return run.run(recipe)


def _poison(forward_step: Any) -> Any:
    calls, here = 0, os.environ.get("RANK", "0") == "0"

    def poisoned(batches: Any, model: Any) -> tuple[Any, Any]:
        nonlocal calls
        output, loss = forward_step(batches, model)
        calls += model.training
        bad = here and (calls + 1) / 2 in _STEPS and model.training  # two micro batches a step
        return (output * float("nan") if bad else output), loss

    return poisoned


if __name__ == "__main__":
    _STEPS = {int(x) for x in sys.argv.pop(1).split(",")}
    run_cli(main, "tests.end_to_end.poisoned_train")
