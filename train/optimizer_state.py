"""How the state of Megatron's optimizers goes into a checkpoint and comes out of it."""

import contextlib
from collections.abc import Iterator
from typing import Any

SHARDING = "fully_reshardable"
"""Optimizer state in the shape of the parameters, so that any layout can load it."""


@contextlib.contextmanager
def padding_kept(optimizer: Any) -> Iterator[None]:
    """Inside, gradient buffers count the padding between their buckets as content.

    Megatron lays out the optimizer's state without that padding and looks parameters up where they
    are with it: whatever follows a padded bucket would be shifted, and the end missing. (It warns
    of this as "param range exceeds unpadded buffer".)
    """
    buffers = [buffer for one in optimizer.chained_optimizers for buffer in one.buffers]
    parts = [(b, b.numel) for b in buffers]
    parts += [(bucket, bucket.grad_data.numel()) for b in buffers for bucket in b.buckets]
    unpadded = [part.numel_unpadded for part, _ in parts]
    for part, padded in parts:
        part.numel_unpadded = padded
    try:
        yield
    finally:
        for (part, _), size in zip(reversed(parts), reversed(unpadded), strict=True):
            part.numel_unpadded = size


def load_optimizer(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Load moments and settings into however many optimizers this rank has.

    Megatron gives experts an optimizer of their own where their data-parallel ranks are not those
    of the dense layers, and saves the settings of the first rank's. Moments are found by the names
    of the parameters; settings, by what kind of parameters they are for.
    """
    # Checkpoints of a single optimizer had no number around it before.
    saved = [loaded, *(v for k, v in loaded.items() if isinstance(k, int))]
    groups = [g for s in saved if "optimizer" in s for g in s["optimizer"]["param_groups"]]
    own = optimizer.chained_optimizers
    states = {
        i: {
            # The first pipeline rank may have had no parameters of a kind; the last of two wins.
            "optimizer": {"param_groups": _at_step(one, groups[0].get("step")) + groups},
            "param_state": loaded[i]["param_state"],
            "param_state_sharding_type": SHARDING,
        }
        for i, one in enumerate(own)
    }
    optimizer.load_state_dict(states if len(own) > 1 else states[0])


@contextlib.contextmanager
def own_settings(optimizer: Any) -> Iterator[None]:
    """Keep the settings the optimizer was built with: a checkpoint brings those of the stage it
    was saved in, and Megatron's schedule reads the rates from them."""
    first, *_ = optimizer.param_groups  # all have the same
    own = {name: first[name] for name in ("max_lr", "min_lr", "betas", "eps")}
    yield
    for group in optimizer.param_groups:
        group.update(own)


def _at_step(optimizer: Any, step: int | None) -> list[dict[str, Any]]:
    """The settings an optimizer was built with, so many steps later."""
    groups = optimizer.state_dict()["optimizer"]["param_groups"]
    return [group | {"step": step} for group in groups]
