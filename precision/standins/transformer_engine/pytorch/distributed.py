"""RNG tracking and recomputation, as far as Megatron-Core imports them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CudaRNGStatesTracker:
    """Base class of Megatron's optional Transformer Engine RNG tracker (not used: Megatron's
    own tracker is)."""

    def __init__(self) -> None:
        raise NotImplementedError(
            "the Transformer Engine stand-in does not implement CudaRNGStatesTracker; "
            "keep use_te_rng_tracker off"
        )


@contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    """Marks recomputed regions for FP8 scaling factors; nothing to mark without them."""
    yield


def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Recompute `function` in the backward pass under a quantized context."""
    raise NotImplementedError(
        "the Transformer Engine stand-in does not implement checkpoint(); Megatron uses its "
        "own recomputation without FP8 or FP4"
    )
