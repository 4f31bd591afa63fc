"""`python -m tests.end_to_end.signalled_train SIGNALS OVERRIDES...`: training that gets signals
(`TERM` or `INT,INT`) while the bytes of the checkpoint of step 4 are written; everything else is
the real command. In the background the writing process gets them too, as it does from Slurm and
from a terminal."""

import os
import signal
import sys
from typing import Any

from recipes.compose import run_cli
from recipes.schema import Recipe


def main(recipe: Recipe) -> int:
    from train import run, writing

    trainer, write = os.getpid(), writing.write_shards

    def signalled(buckets: list[Any]) -> Any:
        first = "iter_0000004" in str(buckets[0][0])
        for number in _SIGNALS if first else []:
            for process in {trainer, os.getpid()}:
                os.kill(process, number)
        return write(buckets)

    writing.write_shards = signalled
    return run.run(recipe)


if __name__ == "__main__":
    _SIGNALS = [signal.Signals[f"SIG{name}"] for name in sys.argv.pop(1).split(",")]
    run_cli(main, "tests.end_to_end.signalled_train")
