"""What went wrong, for users: one sentence with key, value, rule and remedy."""

import contextlib
from collections.abc import Iterator


class StrataError(Exception):
    """Base of every error a user can cause and mend; printed without a traceback."""

    exit_code = 2
    """Of a command that ends with it."""
    on_every_rank = False
    """Raised alike on every rank, so rank 0 alone says it."""


class ConfigError(StrataError):
    """A recipe that cannot be run as written."""


class DataError(StrataError):
    """Training data that is missing, damaged or does not fit the recipe."""


class CheckpointError(StrataError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class PrecisionError(StrataError):
    """Modules that computed in another format than the precision policy's."""

    exit_code = 5


class LostRankError(StrataError):
    """A rank was killed, hung, or lost its connection: the others end with it."""

    exit_code = 6


@contextlib.contextmanager
def on_every_rank() -> Iterator[None]:
    """Inside, every rank does the same with the same: what one raises, all raise."""
    try:
        yield
    except StrataError as error:
        error.on_every_rank = True
        raise
