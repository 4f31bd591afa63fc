"""What went wrong, for users: one sentence with key, value, rule and remedy."""


class StrataError(Exception):
    """Base of every error a user can cause and mend; printed without a traceback."""

    exit_code = 2
    """Of a command that ends with it."""


class ConfigError(StrataError):
    """A recipe that cannot be run as written."""


class DataError(StrataError):
    """Training data that is missing, damaged or does not fit the recipe."""


class CheckpointError(StrataError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class PrecisionError(StrataError):
    """Modules that computed in another format than the precision policy's."""

    exit_code = 5
