"""What is asked of Slurm's own commands."""

import shutil
import subprocess
from pathlib import Path

from recipes.errors import ConfigError


def available(program: str = "sbatch") -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which(program) is not None


def submit(script: Path, *options: str) -> str:
    """Queue a script; the number of its job.

    Raises:
        ConfigError: Slurm does not take it.
    """
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"Slurm refuses {script}: {said}; mend cluster.* and submit again")
    return done.stdout.strip().split(";")[0]


def queued(job: str) -> list[dict[str, str]]:
    """The tasks of a job that are not over: state, nodes, time left, reason; empty: it is over,
    or there is no Slurm to ask."""
    if not available("squeue"):
        return []
    names = {"task": "%i", "state": "%T", "nodes": "%N", "left": "%L", "reason": "%r"}
    done = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", f"--format={'|'.join(names.values())}"],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [dict(zip(names, line.split("|"), strict=True)) for line in lines]
