"""One command at a time in a run directory."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from recipes.errors import ConfigError

LOCK = "lock"
"""File of the run directory that its running command holds; it says who that is."""

_PATIENCE = 10.0
"""Seconds that a command which was just killed may take to be gone."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """An advisory lock on a file of the run directory, held by rank 0.

    POSIX's kind, which NFS and Lustre carry between machines and which goes with the process
    that holds it, however that ends. It goes too when the process closes the file, so nothing
    else in it may open the file.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._file: IO[str] | None = None

    def take(self, same_job_seconds: float) -> str | None:
        """Take the lock, or wait a little for who has it.

        Args:
            same_job_seconds: how long to wait for an earlier start of the same Slurm job: after
                a requeue the old ranks may still be ending, on a node that is cut off.

        Returns:
            What to tell the user if this file system has no locks.

        Raises:
            ConfigError: another command works in the directory.
            OSError: the directory cannot be written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        while True:
            file = self._path.open("a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    file.close()
                    return (
                        f"{self._path} cannot be locked on this file system ({error.strerror}): "
                        "start no second command in this run.dir"
                    )
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                holder = _read(file)
                file.close()
                job = os.environ.get("SLURM_JOB_ID")
                same = job is not None and holder.get("job") == job
                if time.monotonic() - started > (same_job_seconds if same else _PATIENCE):
                    raise ConfigError(self._refusal(holder)) from error
                time.sleep(0.2)
                continue
            if self._path.exists() and os.fstat(file.fileno()).st_ino == self._path.stat().st_ino:
                break
            file.close()  # somebody has put another file in its place
        self._file = file
        file.truncate(0)
        json.dump(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "job": os.environ.get("SLURM_JOB_ID"),
                "since": time.strftime("%F %T"),
            },
            file,
        )
        file.flush()
        return None

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _refusal(self, holder: dict[str, object]) -> str:
        who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
        if holder.get("job"):
            who += f", Slurm job {holder['job']}"
        return (
            f"run.dir={self._path.parent} is in use by {who}; wait until that has ended, or choose "
            f"another run.dir (if its machine has died, remove {self._path})"
        )


def _read(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        holder = json.load(file)
    except ValueError:  # it is just being written
        return {}
    return holder if isinstance(holder, dict) else {}
