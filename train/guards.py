"""What stops a run: signals, and steps whose loss or gradient is not a number.

Every decision is made from numbers all ranks share, so no rank goes on alone.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from data.files import sync
from recipes.errors import LostRankError, PrecisionError, StrataError

EXIT_COMPLETE = 0
"""The run reached its last step."""
EXIT_USER_ERROR = 2
"""A StrataError: nothing was trained that is not saved."""
EXIT_STOPPED = 3
"""A signal asked the run to stop; everything is saved and the same command goes on."""
EXIT_NON_FINITE = 4
"""Loss or gradient was not finite and the recipe says stop (or too often)."""

EXIT_LOST_RANK = LostRankError.exit_code
"""A rank was killed, hung or cut off, and all ranks have ended; the same command goes on."""

EXIT_PRECISION = PrecisionError.exit_code
"""A module computed in another format than the precision policy's."""

_CANNOT_GO_ON = 1000
"""Among the numbers of signals, and above all of them."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Notes a stop signal; the loop asks at safe points.

    Further signals change nothing, but a second SIGINT (Ctrl-C) ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.error: StrataError | None = None
        """Why this rank cannot go on; `agreed` raises it on every rank."""

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the stop signals inside."""
        previous = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. A collective: every rank must call it.

        Raises:
            StrataError: a rank cannot go on.
        """
        import torch
        import torch.distributed as dist

        from data.ranks import raise_together

        own = _CANNOT_GO_ON if self.error else self.signal or 0
        flag = torch.tensor([own], device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        number = int(flag.item())
        if number == _CANNOT_GO_ON:
            raise_together(self.error)
        if number:  # else one may have been noted meanwhile: the next call tells the others
            self.signal = number
        return number != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # The next one finds Python's own handler, which raises KeyboardInterrupt.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.signal = number


@dataclass
class BadStep:
    """One step whose loss or gradient was not finite."""

    step: int
    """The step, counted from 1."""
    first_sample: int
    """Index of the first sample of its batch in the training order."""
    loss: str
    """Loss, as text: JSON has no NaN."""
    grad_norm: str
    """Gradient norm, as text."""
    action: str
    """What was done: stop, skip or rollback."""
    documents: list[list[object]]
    """[data prefix, document ids] of each sample of the batch."""


class BadSteps:
    """The bad steps of a run, kept in `bad_steps.json` of its directory.

    A batch that caused a rollback is skipped when the run reaches it again. A step that was
    skipped after the checkpoint the run resumes from is done again, so its entry is forgotten.

    Args:
        run_dir: the run directory.
        done: steps the run has done.
    """

    def __init__(self, run_dir: Path, done: int) -> None:
        self.path = run_dir / "bad_steps.json"
        self.steps: list[BadStep] = []
        if self.path.exists():
            steps = [BadStep(**entry) for entry in json.loads(self.path.read_text())]
            self.steps = [s for s in steps if s.action != "skip" or s.step <= done]

    def add(self, bad: BadStep, write: bool) -> None:
        """Remember a bad step; the rank that writes also stores it."""
        self.steps.append(bad)
        if write:
            write_atomically(
                self.path, json.dumps([asdict(s) for s in self.steps], indent=1) + "\n"
            )

    def must_skip(self, step: int) -> bool:
        """Whether a rollback marked the batch of this step."""
        return any(s.step == step and s.action == "rollback" for s in self.steps)

    @property
    def survived(self) -> int:
        """Bad steps the run went on from."""
        return sum(s.action != "stop" for s in self.steps)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one move, after its new content is on the disk."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync(path.parent)
