"""RNG tracking and recomputation, as far as Megatron-Core imports them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint

from .quantization import FP8GlobalStateManager, autocast


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


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[[], Any] | None = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """Forget the activations of `function(*args, **kwargs)` and compute them again in the backward
    pass, under the quantized context that is open now and with the same random states.

    The first pass runs without gradients, as the library's does: Megatron counts routed tokens
    only in passes that have them. As there, tensors in `kwargs` get no gradient.

    Raises:
        NotImplementedError: distribute_saved_activations.
    """
    if distribute_saved_activations:
        raise NotImplementedError(
            "the Transformer Engine stand-in does not implement "
            "checkpoint(distribute_saved_activations=True)"
        )
    state = FP8GlobalStateManager.quantization_state
    context = {
        "enabled": state.enabled,
        "recipe": state.recipe,
        "amax_reduction_group": state.group,
    }
    tracker = get_rng_state_tracker() if get_rng_state_tracker else None
    first_states = tracker.get_states() if tracker else None
    passes = 0

    def run(*inputs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 1:
            return function(*inputs, **kwargs)
        now = tracker.get_states() if tracker else None
        if tracker:
            tracker.set_states(first_states)
        try:
            with autocast(**context), activation_recompute_forward(True, True):
                return function(*inputs, **kwargs)
        finally:
            if tracker:
                tracker.set_states(now)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True)
