"""What one rank failed of reaches all: a rank that loses its connection says why it was lost."""

import contextlib
import logging
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.errors import LostRankError, StrataError

_KEY = "first_failure"
_PATIENCE = 3.0
"""Seconds to wait for word of the rank whose end broke a connection."""

GOES_ON = "the same command goes on from the last checkpoint"


@contextlib.contextmanager
def failures_told(store: Any, rank: int, fate: Path | None, logs: Path) -> Iterator[None]:
    """The first rank that fails inside leaves word; the others raise that, not what it broke.

    Args:
        store: the torch.distributed store of all ranks.
        rank: this rank.
        fate: file in which whoever started the ranks says that one was killed; None: nobody does.
        logs: folder of the ranks' logs, for messages.

    Raises:
        StrataError: another rank's, with its number.
        LostRankError: another rank failed otherwise, was killed or cut off.
    """
    try:
        yield
    except StrataError as error:
        _leave_word(store, rank, error)
        raise
    except Exception as error:
        if not _is_broken_connection(error):
            text = f"{type(error).__name__}: {_first_line(error)}"
            _leave_word(store, rank, LostRankError(f"{text}; see {logs}; {GOES_ON}"))
            raise
        logging.getLogger("strata").exception("another rank was lost")
        word = _word(store, fate)
        if word is None:
            told: StrataError = LostRankError(
                f"rank {rank} lost its connection to another one, which was killed or cut off "
                f"({_first_line(error)}); see {logs}; {GOES_ON}"
            )
            _leave_word(store, rank, told)
        elif isinstance(word, str):
            told = LostRankError(f"{word}; see {logs}; {GOES_ON}")
        else:
            first, cause = word
            told = type(cause)(str(cause) if _names_a_rank(cause) else f"rank {first}: {cause}")
            told.on_every_rank = True
        raise told from error


def _leave_word(store: Any, rank: int, error: StrataError) -> None:
    plain = type(error)(str(error))
    with contextlib.suppress(Exception):  # the store may have gone with the rank that kept it
        store.compare_set(_KEY, "", pickle.dumps((rank, plain)).hex())


def _word(store: Any, fate: Path | None) -> tuple[int, StrataError] | str | None:
    """What another rank, or whoever started it, has left; waits for it a little."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(Exception):
            if store.check([_KEY]):
                word: tuple[int, StrataError] = pickle.loads(
                    bytes.fromhex(store.get(_KEY).decode())
                )
                return word
        if fate is not None and fate.exists():
            return fate.read_text().strip()
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)


def _names_a_rank(error: StrataError) -> bool:
    return isinstance(error, LostRankError) and str(error).startswith("rank ")


def _is_broken_connection(error: Exception) -> bool:
    """Whether the error comes of a collective that another rank did not finish."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"\bgloo/|NCCL", str(error)) is not None
    )


def _first_line(error: Exception) -> str:
    """Without gloo's place in its source, and the address it met."""
    lines = str(error).strip().splitlines() or [""]
    return re.sub(r"^\[\S+\] | \[[^\[]*$", "", lines[0]).rstrip(". ")
