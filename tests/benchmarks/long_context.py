"""Memory and time of a step against the length of its sequence, on two context-parallel ranks.

    python -m tests.benchmarks.long_context [8192 32768 131072 524288] [KEY=VALUE ...]

Trains the tiny model for two optimizer steps of one sequence at each length, with states passed
between ranks, losses in chunks and selective recomputation, and prints one JSON object a line:
peak memory of each rank, what of rank 0's is above a rank with next to no tokens (libraries,
weights), and the seconds of the second step. Further overrides are passed on: `data=packages` reads
long documents, `--recompute full` computes whole layers again. Needs the prepared data.

Lengths beyond 131072 take hours on a small machine: with `--folder DIR` the runs are kept there
with a checkpoint a step, DIR/results.json holds what is measured, and the same command goes on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train.guards import write_atomically

LENGTHS = (8192, 32768, 131072, 524288)
IDLE = 512
"""A sequence whose activations do not count."""

RECIPE = (
    "experiment=tiny",
    "parallel.context_parallel_size=2",
    "parallel.mamba_context=state",
    "parallel.cross_entropy_loss_chunk=2048",
    "parallel.timeout_minutes=600",
    "stage.global_batch_size=1",
    "stage.micro_batch_size=1",
    "stage.train_steps=2",
    "stage.eval_interval=null",
    "data.validation=[]",
    "checkpoint.save_interval=1",
    "logging.progress=false",
)

RECOMPUTE = {
    "selective": (
        "parallel.recompute_granularity=selective",
        "parallel.recompute_modules=[layernorm,moe]",
    ),
    "full": (
        "parallel.recompute_granularity=full",
        "parallel.recompute_method=uniform",
        "parallel.recompute_num_layers=1",
    ),
}


def measure(folder: Path, length: int, overrides: list[str]) -> dict[str, Any]:
    """Train two steps of one length in a folder, or go on; peaks in GiB, seconds of the second."""
    run = folder / str(length)
    command = [sys.executable, "-m", "train", *RECIPE, *overrides]
    command += [f"run.dir={run}", f"stage.sequence_length={length}"]
    peaks: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for rank, pid in enumerate(children(process.pid)):
                peaks[rank] = max(peaks.get(rank, 0.0), peak_gib(pid))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{length} tokens ended with exit code {process.returncode}")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {"peaks": [peaks[r] for r in sorted(peaks)], "seconds": last["seconds"]}


def children(pid: int) -> list[int]:
    """The ranks a command has started, in their order."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def peak_gib(pid: int) -> float:
    """Most memory a process has had so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0]) / 2**20 if found else 0.0


def main() -> None:
    """Measure every length named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.long_context")
    parser.add_argument("words", nargs="*", metavar="LENGTH or KEY=VALUE")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="selective")
    parser.add_argument("--folder", type=Path, help="keep the runs and results.json here")
    chosen = parser.parse_intermixed_args()
    overrides = [*RECOMPUTE[chosen.recompute], *(w for w in chosen.words if "=" in w)]
    lengths = [int(word) for word in chosen.words if "=" not in word] or list(LENGTHS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        for length in [IDLE, *lengths]:
            if str(length) not in results:
                results[str(length)] = measure(folder, length, overrides)
                write_atomically(file, json.dumps(results, indent=1) + "\n")
            if length != IDLE:
                print(json.dumps(summary(results, length)), flush=True)


def summary(results: dict[str, Any], length: int) -> dict[str, Any]:
    """What is said of one length."""
    found = results[str(length)]
    above = found["peaks"][0] - results[str(IDLE)]["peaks"][0]
    return {
        "sequence_length": length,
        "peak_gib": [round(peak, 3) for peak in found["peaks"]],
        "above_idle_gib": round(above, 3),
        "kib_per_token_of_a_rank": round(above * 2**20 / (length / 2), 2),
        "seconds_per_step": round(found["seconds"], 1),
    }


if __name__ == "__main__":
    main()
