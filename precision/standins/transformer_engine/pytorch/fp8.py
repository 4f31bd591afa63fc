"""Quantization contexts. The stand-in computes in BF16/FP32 only: asking for a quantized
context is an error, never a silent run in higher precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..common.recipe import Recipe


class FP8GlobalStateManager:
    """What Megatron-Core asks about the current quantization context."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether a quantized context is open; never, in this stand-in."""
        return False

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        """The recipe of the open context."""
        raise RuntimeError("no quantized autocast context is open")

    @classmethod
    def reset(cls) -> None:
        """Forget all state; there is none."""


@contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Recipe | None = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Context in which modules quantize their operands by `recipe`.

    Raises:
        NotImplementedError: if enabled; the modules of this stand-in do not quantize.
    """
    if enabled or calibrating:
        name = type(recipe).__name__ if recipe is not None else "the default recipe"
        raise NotImplementedError(
            f"the Transformer Engine stand-in does not quantize yet ({name} was asked for); "
            "use precision=bf16 or precision=fp32"
        )
    yield


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """The older name of `autocast`."""
    with autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph):
        yield


@contextmanager
def quantized_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> Iterator[None]:
    """Context in which modules create quantized parameters.

    Raises:
        NotImplementedError: if enabled.
    """
    if enabled:
        raise NotImplementedError(
            "the Transformer Engine stand-in has no quantized parameters "
            "(fp8_param / fp4_param); keep them in high precision"
        )
    yield


fp8_model_init = quantized_model_init
