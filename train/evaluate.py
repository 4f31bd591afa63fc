"""`python -m train.evaluate CHECKPOINT...`: the validation loss of checkpoints of one run.

Each is a run, one of its checkpoints, or a merged one. The recipe, its held-out data and
stage.eval_steps are those of the first; the loss is computed on one rank, unquantised. Prints a
table, and with --json FILE also writes it there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.errors import ConfigError, StrataError
from recipes.tables import table
from train.loaded import Loaded, require_data, with_model

if TYPE_CHECKING:
    from train.batches import Batches


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m train.evaluate")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="also write {checkpoint: loss} here")
    chosen = parser.parse_args()
    try:
        require_data(
            chosen.checkpoints[0],
            "data.validation",
            "name a run before it, on whose held-out data all are evaluated",
        )
        code = with_model(
            chosen.checkpoints[0], lambda first: evaluate(first, chosen.checkpoints, chosen.json)
        )
    except StrataError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code)


def evaluate(loaded: Loaded, checkpoints: list[Path], json_file: Path | None) -> int:
    """Print the validation loss of each checkpoint, in nats per token."""
    from tqdm import tqdm

    from train.batches import Batches, check_data
    from train.weights import load_model

    recipe = loaded.recipe
    check_data(recipe)
    data = Batches(recipe, dp=1)
    if not data.has_validation:
        raise ConfigError("data.validation is empty in this run: there is nothing to evaluate on")
    losses: dict[str, float] = {}
    for checkpoint in tqdm(checkpoints, desc="evaluating"):
        load_model(checkpoint, [loaded.model])
        losses[str(checkpoint)] = validation_loss(loaded, data)
    rows = [("checkpoint", "validation loss"), *((k, f"{v:.5f}") for k, v in losses.items())]
    print(table(rows, left=[0]))
    if json_file is not None:
        json_file.write_text(json.dumps(losses, indent=1) + "\n")
    return 0


def validation_loss(loaded: Loaded, data: "Batches") -> float:
    """Mean cross-entropy of the first held-out batches of stage.eval_steps steps."""
    import torch

    from train.step import forward_step

    stage = loaded.recipe.stage
    batches = data.validation()
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(stage.eval_steps * stage.global_batch_size // stage.micro_batch_size):
            output, loss = forward_step(batches, loaded.model)
            total += loss(output)[2].cpu()
    return (total[0] / total[1]).item()


if __name__ == "__main__":
    main()
