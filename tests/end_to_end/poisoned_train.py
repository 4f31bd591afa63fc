"""`python -m tests.end_to_end.poisoned_train KIND STEPS OVERRIDES...`: training whose loss, or
only its gradient, (KIND) is NaN at some steps (`5` or `2,3`), on rank 0 alone; everything else is
the real command. In the end each rank's hash of its own parameters is in `ranks.json`."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from recipes.compose import run_cli
from recipes.schema import Recipe


def main(recipe: Recipe) -> int:
    from train import run

    original = run.train

    def start(*arguments: Any) -> int:
        # These import Megatron, so not before the backends are in place.
        from train import step, trainer

        step.forward_step = _poison(step.forward_step)
        trainer.Trainer.fit = _comparing(trainer.Trainer.fit)  # type: ignore[method-assign]
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
        if bad and _KIND == "gradient":
            output = output.clone()
            output.register_hook(lambda gradient: gradient * float("nan"))
        elif bad:
            output = output * float("nan")
        return output, loss

    return poisoned


def _comparing(fit: Any) -> Any:
    def compared(trainer: Any) -> int:
        import torch.distributed as dist

        code = fit(trainer)
        own = hashlib.sha256()
        for chunk in trainer.state.chunks:
            for _, tensor in (*chunk.named_parameters(), *chunk.named_buffers()):
                own.update(tensor.detach().float().cpu().numpy().tobytes())
        hashes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hashes, own.hexdigest())
        (Path(trainer.recipe.run.dir) / "ranks.json").write_text(json.dumps(hashes))
        return code

    return compared


if __name__ == "__main__":
    _KIND = sys.argv.pop(1)
    _STEPS = {int(x) for x in sys.argv.pop(1).split(",")}
    run_cli(main, "tests.end_to_end.poisoned_train")
