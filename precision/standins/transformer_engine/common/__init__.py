"""Framework-independent part: the recipes."""

from . import recipe

__all__ = ["recipe"]
