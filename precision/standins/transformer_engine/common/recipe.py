"""Quantization recipes, as data.

Same names, fields and defaults as `transformer_engine.common.recipe`. The modules of this
stand-in do not quantize yet: `autocast(enabled=True)` refuses every one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Format(Enum):
    """FP8 element formats of the forward and backward tensors."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


@dataclass
class Recipe:
    """Base of every recipe."""


@dataclass
class DelayedScaling(Recipe):
    """Per-tensor FP8 with a history of maxima."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable[..., Any] = "max"
    scaling_factor_compute_algo: Callable[..., Any] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8CurrentScaling(Recipe):
    """Per-tensor FP8 with the maximum of the tensor itself."""

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    """FP8 with FP32 scales of 1x128 and 128x128 blocks."""

    fp8_format: Format = Format.E4M3


@dataclass
class MXFP8BlockScaling(Recipe):
    """FP8 with E8M0 scales of 1x32 blocks."""

    margin: int = 0
    fp8_format: Format = Format.E4M3


@dataclass
class NVFP4BlockScaling(Recipe):
    """E2M1 with E4M3 scales of 16-element blocks and one FP32 scale a tensor."""

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False


@dataclass
class CustomRecipe(Recipe):
    """Quantizers made by a user's factory, one a tensor role."""

    qfactory: Callable[..., Any] | None = None
