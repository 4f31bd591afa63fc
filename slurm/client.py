"""What is asked of Slurm's own commands."""

import os
import shutil
import subprocess
from pathlib import Path

from recipes.errors import ConfigError

_PATIENCE = 60
"""Seconds for an answer of Slurm's controller."""
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS")
"""The other variables that begin with SLURM_ are those of a job."""


def available(program: str = "sbatch") -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which(program) is not None


def submit(script: Path, *options: str) -> str:
    """Queue a script; the number of its job.

    Raises:
        ConfigError: Slurm does not take it.
    """
    # Where this is typed inside a job, the new one would take its numbers for its own.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in _OF_THE_SITE
    }
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(script)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"Slurm refuses {script}: {said}; mend cluster.* and submit again")
    return done.stdout.strip().split(";")[0]


def queued(job: str) -> list[dict[str, str]]:
    """The tasks of a job that are not over: state, nodes, time left, reason; empty: it is over,
    or there is no Slurm to ask.

    Raises:
        ConfigError: squeue does not answer. That does not say that the job is over.
    """
    if not available("squeue"):
        return []
    names = {"task": "%i", "state": "%T", "nodes": "%N", "left": "%L", "reason": "%r"}
    done = _ask("squeue", "--noheader", f"--jobs={job}", f"--format={'|'.join(names.values())}")
    if done.returncode and "Invalid job id" not in done.stderr:  # which it is some time after
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"squeue cannot say whether job {job} is over: {said}; try again later")
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    rows = [line.split("|", len(names) - 1) for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def accounted(job: str) -> str | None:
    """State of a job that is over, by Slurm's accounting (`CANCELLED by 1000`, `OUT_OF_MEMORY`);
    None: there is none, or it does not know the job."""
    if not available("sacct"):
        return None
    options = ("--noheader", "--parsable2", "--allocations", "--format=State")
    try:
        done = _ask("sacct", *options, f"--jobs={job}")
    except ConfigError:
        return None
    return next((line for line in done.stdout.splitlines() if line.strip()), None)


def _ask(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{command[0]} has not answered for {_PATIENCE} seconds; try again later"
        ) from error
