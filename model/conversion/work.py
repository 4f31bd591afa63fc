"""Writing a folder in parts: in parallel, with a progress bar, and on again after a kill.

What is done is noted in `.conversion` inside the target folder. The files that make the folder
readable are written after all parts, and the notes go after them, at one stroke: a folder is whole,
or has the notes with which the same command goes on.
"""

import errno
import fcntl
import functools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.errors import CheckpointError

_NOTES = ".conversion"
_TASK, _LOCK = "task.json", "lock"


def explained[**P, R](write: Callable[P, R]) -> Callable[P, R]:
    """Let what writes a folder end in one sentence where the file system refuses.

    Raises:
        CheckpointError: the disk is full, the folder is read-only, ...
    """

    @functools.wraps(write)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return write(*args, **kwargs)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else "writing failed: "
            reason = f"{where}{error.strerror or error}"
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise
            # torch's writer hides what the file system said.
            reason = "writing failed, probably for want of space"
        raise CheckpointError(f"{reason}; mend that, and the same command goes on") from None

    return run


class Work:
    """The writing of one folder.

    Args:
        target: the folder; new, empty, or left unfinished by the same task.
        task: what is written and from what; JSON. Work goes on only where it is the same.

    Raises:
        CheckpointError: the folder holds something else, or another command is at it.
    """

    def __init__(self, target: Path, task: dict[str, Any]) -> None:
        self.target = target
        self._notes = target / _NOTES
        note = self._notes / _TASK
        if note.exists():
            if json.loads(note.read_text()) != task:
                raise CheckpointError(
                    f"{target} holds the unfinished work of another command; remove it, or choose "
                    "another folder"
                )
            self._lock()
            return
        # A kill may have left the folder of the notes, but not yet the first of them.
        if target.exists() and any(path != self._notes for path in target.iterdir()):
            raise CheckpointError(f"{target} is not empty; choose another folder, or remove it")
        self._notes.mkdir(parents=True, exist_ok=True)
        self._lock()
        _write(note, json.dumps(task, indent=1).encode())

    def _lock(self) -> None:
        """For as long as this process has the file open; where the file system has no locks nobody
        is refused."""
        self._locked = (self._notes / _LOCK).open("w")
        try:
            fcntl.lockf(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    f"another command is writing {self.target}; wait until it has ended, or choose "
                    "another folder"
                ) from None

    def run(
        self,
        sizes: Sequence[int],
        write: Callable[[int, Callable[[int], object]], Any],
        workers: int,
        title: str,
    ) -> list[Any]:
        """Write the parts that are not there yet.

        Args:
            sizes: bytes of each part.
            write: writes a part, given its number and a function to report bytes to; what it
                returns is kept.
            workers: threads.
            title: of the progress bar.

        Returns:
            What `write` returned for each part, now or before a kill.
        """
        results: list[Any] = [None] * len(sizes)
        left = []
        for part in range(len(sizes)):
            done = self._notes / f"{part}.pickle"
            if done.exists():
                results[part] = pickle.loads(done.read_bytes())
            else:
                left.append(part)
        finished = sum(sizes) - sum(sizes[part] for part in left)
        with _progress(title, sum(sizes), finished) as advance:

            def one(part: int) -> None:
                results[part] = write(part, advance)
                _write(self._notes / f"{part}.pickle", pickle.dumps(results[part]))

            _in_parallel(one, left, workers)
        return results

    def finish(self) -> None:
        """Everything is written: drop the notes."""
        dropped = self._notes.with_name(f"{_NOTES}.done")
        os.rename(self._notes, dropped)
        self._locked.close()
        shutil.rmtree(dropped)


@contextmanager
def _progress(title: str, total: int, initial: int = 0) -> Iterator[Callable[[int], object]]:
    """A progress bar over bytes; gives the function that advances it."""
    from tqdm import tqdm

    with tqdm(total=total, initial=initial, desc=title, unit="B", unit_scale=True) as bar:
        yield bar.update


def _in_parallel(action: Callable[[Any], None], items: Sequence[Any], workers: int) -> None:
    """Run the action on every item; the first failure, or Ctrl-C, ends it once the actions that run
    have ended, and is raised."""
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = {pool.submit(action, item) for item in items}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
