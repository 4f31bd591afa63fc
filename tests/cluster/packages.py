"""Debian's Slurm, installed without starting its services."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "iproute2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip")
_POLICY = Path("/usr/sbin/policy-rc.d")


def missing() -> list[str]:
    """Programs of the lab that are not installed."""
    return [name for name in PROGRAMS if program(name) is None]


def program(name: str) -> str | None:
    """Path of a program, also of one that only root usually finds; None: not installed."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def install() -> None:
    """Install what is missing, 13 MB.

    Raises:
        RuntimeError: this is no Debian, the user is not root or the registry cannot be reached.
    """
    absent = missing()
    if not absent:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise RuntimeError(
            f"{', '.join(absent)} are missing, and installing them needs root and apt-get; "
            f"install {' '.join(PACKAGES)} yourself"
        )
    with _no_services():
        _apt("update")
        _apt("install", "--yes", "--no-install-recommends", *PACKAGES)
    if missing():
        raise RuntimeError(f"apt-get has not installed {', '.join(missing())}")


def version() -> tuple[int, int]:
    """Year and month of the installed Slurm: (22, 5)."""
    path = program("slurmd")
    assert path is not None, "installed before"
    words = subprocess.run([path, "-V"], capture_output=True, text=True, check=True)
    year, month = words.stdout.split()[-1].split(".")[:2]
    return int(year), int(month)


def _apt(*arguments: str) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        ["apt-get", "-q", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"apt-get {arguments[0]} failed:\n{done.stdout}")


@contextmanager
def _no_services() -> Iterator[None]:
    """Debian's packages start their services unless this script forbids it."""
    before = _POLICY.read_text() if _POLICY.exists() else None
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        if before is None:
            _POLICY.unlink()
        else:
            _POLICY.write_text(before)
