"""One rank acts for all: what it returns, or how it failed, reaches every rank."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from recipes.errors import StrataError, on_every_rank


def on_first_rank[T](action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give its result, or its exception, to every rank.

    A collective where torch.distributed is up, a plain call where it is not. Result and
    exception are pickled.
    """
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # raised again on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        with on_every_rank():
            raise outcome[1]
    return outcome[0]


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what was raised on any: the error of the lowest rank that has one, but an
    explained one first. (What one rank fails of breaks connections of others.)

    A collective: every rank must call it.
    """
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    raised = [e for e in errors if e is not None]
    for first in sorted(raised, key=lambda e: not isinstance(e, StrataError)):
        with on_every_rank():
            raise first
