"""`python -m slurm.health`: is this node fit for the run? One process a node, before the ranks.

Writes `ok`, or what is wrong, into FOLDER/NODE, where the batch script looks. Standard library
only: it must also say something where little else works.
"""

import argparse
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def main() -> int:
    """Check this node; the exit code is 1 if something is wrong."""
    limits = _arguments()
    wrong = list(problems(limits))
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
    text = "; ".join(wrong) or "ok"
    scratch = limits.folder / f".{node}"
    scratch.write_text(text + "\n")
    scratch.replace(limits.folder / node)
    print(text)
    return 1 if wrong else 0


def problems(limits: argparse.Namespace) -> Iterator[str]:
    """What is wrong with this node, a phrase each."""
    skew = time.time() - limits.time
    # Starting the check takes a while, the import of a container minutes: a clock that is ahead
    # cannot be told from a late start.
    if (
        not -limits.max_clock_skew_seconds
        <= skew
        <= (limits.max_clock_skew_seconds + limits.timeout_seconds)
    ):
        yield f"clock differs by {skew:.0f} s"
    for folder in limits.disk:
        try:
            free = shutil.disk_usage(folder).free / 1e9
        except OSError as error:
            yield f"{folder}: {error.strerror}"
            continue
        if free < limits.min_free_disk_gb:
            yield f"{folder} has {free:.1f} GB free, less than {limits.min_free_disk_gb:g}"
    memory = free_memory_gb()
    if memory < limits.min_free_memory_gb:
        yield f"{memory:.1f} GB memory free, less than {limits.min_free_memory_gb:g}"
    if limits.gpus:
        yield from gpu_problems(limits)


def free_memory_gb(table: Path = Path("/proc/meminfo")) -> float:
    """Memory a new process can get, in 10^9 bytes."""
    fields = dict(line.split(":", 1) for line in table.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 / 1e9


GPU_FIELDS = (
    "index",
    "temperature.gpu",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
)
"""What nvidia-smi is asked for."""

_BROKEN = re.compile(r"err!|unknown|reset|lost", re.IGNORECASE)
"""What it writes instead of a number of a GPU that does not answer (`[Unknown Error]`, `ERR!`,
`[GPU requires reset]`, `[GPU is lost]`). `[N/A]` and `[Not Supported]` only say it has none."""


def gpu_problems(limits: argparse.Namespace) -> Iterator[str]:
    """What nvidia-smi says against the GPUs."""
    query = f"--query-gpu={','.join(GPU_FIELDS)}"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        yield f"nvidia-smi: {error}"
        return
    if done.returncode:
        said = (done.stdout + done.stderr).strip() or f"exit code {done.returncode}"
        yield f"nvidia-smi: {said.splitlines()[0]}"
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line]
    if len(rows) != limits.gpus:
        yield f"{len(rows)} GPUs instead of {limits.gpus}"
    for row in rows:
        unknown = [cell for cell in row if _BROKEN.search(cell)]
        if unknown or len(row) != len(GPU_FIELDS):
            yield f"nvidia-smi says of GPU {row[0]}: {', '.join(unknown or row)}"
            continue
        index, temperature, memory, errors, slow = row
        if _number(temperature) > limits.max_gpu_temperature:
            yield f"GPU {index} has {temperature} C, more than {limits.max_gpu_temperature:g}"
        if _number(memory) * 2**20 / 1e6 > limits.max_gpu_memory_used_mb:
            yield f"GPU {index} has {memory} MiB in use by somebody else"
        if _number(errors) > 0:
            yield f"GPU {index} has {errors} uncorrected memory errors"
        if slow == "Active":
            yield f"GPU {index} runs below its clock (hardware slowdown)"


def _number(cell: str) -> float:
    """A cell of nvidia-smi; what the GPU does not report (`[N/A]`) is 0."""
    try:
        return float(cell)
    except ValueError:
        return 0.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m slurm.health", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the answer goes")
    parser.add_argument("--disk", nargs="*", default=[], help="folders that need free space")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs the node must have")
    parser.add_argument("--time", type=float, default=time.time(), help="clock of the first node")
    parser.add_argument("--timeout-seconds", type=float, default=60, help="longest start")
    parser.add_argument("--min-free-disk-gb", type=float, default=0)
    parser.add_argument("--min-free-memory-gb", type=float, default=0)
    parser.add_argument("--max-clock-skew-seconds", type=float, default=10)
    parser.add_argument("--max-gpu-temperature", type=float, default=85)
    parser.add_argument("--max-gpu-memory-used-mb", type=float, default=2000)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
