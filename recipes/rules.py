"""The rules recipes are checked with; each failure is one sentence: key, value, rule, remedy.

Every function returns quietly or raises ConfigError.
"""

from collections.abc import Iterable
from math import inf
from typing import Any, NoReturn

from recipes.errors import ConfigError

SHOWN = 12
"""Choices listed in a message before it says "..."."""


def show(value: Any) -> str:
    """A value as one writes it in a recipe."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def fail(key: str, value: Any, rule: str, remedy: str) -> NoReturn:
    """Raise `key=value rule; remedy`."""
    raise ConfigError(f"{key}={show(value)} {rule}; {remedy}")


def listed(values: Iterable[Any]) -> str:
    """`1, 2, 4 or 8`, cut after SHOWN entries."""
    words = [show(v) for v in values]
    if len(words) > SHOWN:
        return ", ".join(words[:SHOWN]) + ", ..."
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def one_of(key: str, value: Any, allowed: Iterable[Any]) -> None:
    """The value is one of a finite list."""
    allowed = list(allowed)
    if value not in allowed:
        fail(key, value, "is not a choice", f"use {listed(allowed)}")


def at_least(key: str, value: float | None, low: int, or_null: str = "") -> None:
    """The value is finite and `low` or more; null passes when `or_null` says what null means."""
    if value is None and or_null:
        return
    if value is None or not low <= value < inf:
        remedy = f"use {low} or more"
        fail(
            key,
            value,
            f"must be at least {low}",
            f"{remedy}, or null ({or_null})" if or_null else remedy,
        )


def above(key: str, value: float | None, low: float, or_null: str = "") -> None:
    """The value is finite and greater than `low`; null as in `at_least`."""
    if value is None and or_null:
        return
    if value is None or not low < value < inf:
        remedy = f"use a number above {low:g}"
        fail(
            key,
            value,
            f"must be above {low:g}",
            f"{remedy}, or null ({or_null})" if or_null else remedy,
        )


def within(key: str, value: float, low: float, high: float, closed: bool = False) -> None:
    """low <= value < high, or <= high when closed."""
    if not (low <= value < high or (closed and value == high)):
        interval = f"[{low:g}, {high:g}{']' if closed else ')'}"
        fail(key, value, f"is outside {interval}", f"use a number in {interval}")


def divides(key: str, value: int, whole_key: str, whole: int) -> None:
    """The value divides `whole`, the value of another key or expression."""
    if whole % value:
        fail(
            key,
            value,
            f"does not divide {whole_key}={whole} ({whole} % {value} = {whole % value})",
            f"use {listed(d for d in range(1, whole + 1) if whole % d == 0)}",
        )


def multiple(key: str, value: int, of_key: str, of: int) -> None:
    """The value is a multiple of `of`, the value of another key or expression."""
    if value % of:
        below = value - value % of
        fail(
            key,
            value,
            f"is not a multiple of {of_key}={of} ({value} % {of} = {value % of})",
            f"use {listed([below, below + of] if below else [of, 2 * of])}",
        )
