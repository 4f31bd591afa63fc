"""`python -m model.merge runs/mine merged`: the mean of a run's checkpoints.

    python -m model.merge RUN TARGET [merge.KEY=VALUE]...
    python -m model.merge CHECKPOINT CHECKPOINT... TARGET [merge.KEY=VALUE]...

Then `python -m train.evaluate`, in a process of its own, gives the validation loss of each
checkpoint and of the mean (merge.evaluate=false: no).
"""

import subprocess
import sys

from recipes.compose import run_cli
from recipes.schema import Recipe
from recipes.tables import table


def main() -> None:
    """Entry point; everything heavy is imported behind it."""
    words = sys.argv[1:]
    paths = [w for w in words if "=" not in w and not w.startswith("-")]
    sys.argv[1:] = [w for w in words if w not in paths]

    def run(recipe: Recipe) -> int:
        from model.conversion.merge import merge

        options = recipe.merge
        if paths:
            *options.sources, options.target = paths
        target, chosen = merge(options)
        print(table([("checkpoint", "weight"), *((str(p), f"{w:.4f}") for p, w in chosen)], [0]))
        print(f"written: {target}", flush=True)
        if not options.evaluate:
            return 0
        checkpoints = [str(path) for path, _ in chosen] + [str(target)]
        return subprocess.run([sys.executable, "-m", "train.evaluate", *checkpoints]).returncode

    run_cli(run, "model.merge")


if __name__ == "__main__":
    main()
