"""Memory and time of a step against the length of its sequence, on two context-parallel ranks.

    python -m tests.benchmarks.long_context [8192 32768 131072 524288] [KEY=VALUE ...]

Trains the tiny model for two optimizer steps of one sequence at each length, with states passed
between ranks, losses in chunks and selective recomputation, and prints one JSON object a line:
peak memory of rank 0 (the ranks hold equally much), what of it is above a rank with next to no
tokens (libraries, weights), and the seconds of the second step. Further overrides are passed on.
Needs the prepared data of `python -m data.prepare experiment=tiny`; lengths beyond 131072 take
hours on a small machine.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTHS = (8192, 32768, 131072, 524288)
IDLE = 512
"""A sequence whose activations do not count."""

RECIPE = (
    "experiment=tiny",
    "parallel.context_parallel_size=2",
    "parallel.mamba_context=state",
    "parallel.cross_entropy_loss_chunk=2048",
    "parallel.recompute_granularity=selective",
    "parallel.recompute_modules=[layernorm,moe]",
    "parallel.timeout_minutes=120",
    "stage.global_batch_size=1",
    "stage.micro_batch_size=1",
    "stage.train_steps=2",
    "stage.eval_interval=null",
    "data.validation=[]",
    "checkpoint.save_interval=null",
    "logging.progress=false",
)


def measure(length: int, overrides: list[str]) -> tuple[float, float]:
    """Peak memory of rank 0 in GiB and seconds of the second step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, "-m", "train", *RECIPE, *overrides]
        command += [f"run.dir={run}", f"stage.sequence_length={length}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return last["memory_gib"], last["seconds"]


def main() -> None:
    """Measure every length named on the command line."""
    words = sys.argv[1:]
    overrides = [word for word in words if "=" in word]
    lengths = [int(word) for word in words if "=" not in word] or LENGTHS
    idle, _ = measure(IDLE, overrides)
    for length in lengths:
        peak, seconds = measure(length, overrides)
        found = {
            "sequence_length": length,
            "peak_gib": round(peak, 3),
            "above_idle_gib": round(peak - idle, 3),
            "kib_per_token_of_a_rank": round((peak - idle) * 2**20 / (length / 2), 2),
            "seconds_per_step": round(seconds, 1),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
