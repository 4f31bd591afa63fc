"""`python -m tests.end_to_end.signalled_train SIGNALS OVERRIDES...`: training that gets signals
(`TERM` or `INT,INT`) while the bytes of the checkpoint of step 4 are written; everything else is
the real command. In the background the writing process gets them too, as it does from Slurm and
from a terminal."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from recipes.compose import run_cli
from recipes.schema import Recipe


def main(recipe: Recipe) -> int:
    from train import run

    original, trainer = run.train, os.getpid()

    def start(*arguments: Any) -> int:
        from megatron.core.dist_checkpointing.strategies.filesystem_async import (
            FileSystemWriterAsync,
        )

        write = FileSystemWriterAsync.write_preloaded_data_multithread
        signalled = _signalled(write, trainer)
        FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(signalled)
        return original(*arguments)

    run.train = start  # type: ignore[assignment]
    return run.run(recipe)


def _signalled(write: Callable[..., None], trainer: int) -> Callable[..., None]:
    def writing(transforms: Any, use_msc: bool, rank: int, buckets: Any, results: Any) -> None:
        first = "iter_0000004" in buckets[0][0]
        for number in _SIGNALS if first else []:
            for process in {trainer, os.getpid()}:
                os.kill(process, number)
        write(transforms, use_msc, rank, buckets, results)

    return writing


if __name__ == "__main__":
    _SIGNALS = [signal.Signals[f"SIG{name}"] for name in sys.argv.pop(1).split(",")]
    run_cli(main, "tests.end_to_end.signalled_train")
