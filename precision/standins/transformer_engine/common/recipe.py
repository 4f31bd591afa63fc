"""Quantization recipes, as data.

Same names, fields and defaults as `transformer_engine.common.recipe`, environment variables
included; those are read when a recipe is made, not when the module is imported. `autocast`
refuses the recipes, and the settings of them, that this stand-in does not compute.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Format(Enum):
    """Element formats of the forward and backward tensors."""

    E2M1 = "e2m1"
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


@dataclass(frozen=True)
class QParams:
    """How one kind of tensor is quantized."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


def _switch(variable: str) -> Any:
    """A field that is True if the environment variable is "1"."""
    return field(default_factory=lambda: os.getenv(variable, "0") == "1")


def _setting(variable: str, default: str) -> Any:
    """A field that is what the environment variable says."""
    return field(default_factory=lambda: os.getenv(variable, default))


@dataclass(kw_only=True)
class Recipe:
    """Base of every recipe."""

    backward_override: str | None = field(
        default_factory=lambda: os.getenv("NVTE_BACKWARD_OVERRIDE")
    )

    @classmethod
    def nvfp4(cls) -> bool:
        """Whether it is NVFP4BlockScaling."""
        return issubclass(cls, NVFP4BlockScaling)

    @classmethod
    def mxfp8(cls) -> bool:
        """Whether it is MXFP8BlockScaling."""
        return issubclass(cls, MXFP8BlockScaling)

    @classmethod
    def delayed(cls) -> bool:
        """Whether it is DelayedScaling."""
        return issubclass(cls, DelayedScaling)

    @classmethod
    def float8_current_scaling(cls) -> bool:
        """Whether it is Float8CurrentScaling."""
        return issubclass(cls, Float8CurrentScaling)

    @classmethod
    def float8_block_scaling(cls) -> bool:
        """Whether it is Float8BlockScaling."""
        return issubclass(cls, Float8BlockScaling)

    @classmethod
    def custom(cls) -> bool:
        """Whether it is CustomRecipe."""
        return issubclass(cls, CustomRecipe)


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
    """FP8 with E8M0 scales of 1x32 blocks; HYBRID means E5M2 gradients."""

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    enable_2d_quantization: bool = False


@dataclass
class NVFP4BlockScaling(Recipe):
    """E2M1 with E4M3 scales of 16-element blocks and one FP32 scale a tensor."""

    disable_rht: bool = _switch("NVTE_NVFP4_DISABLE_RHT")
    disable_stochastic_rounding: bool = _switch("NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING")
    disable_2d_quantization: bool = _switch("NVTE_NVFP4_DISABLE_2D_QUANTIZATION")
    row_scaled_activation: bool = _switch("NVTE_NVFP4_ROW_SCALED_ACTIVATION")
    nvfp4_4over6: str = _setting("NVTE_NVFP4_4OVER6", "none")
    nvfp4_4over6_e4m3_use_256: str = _setting("NVTE_NVFP4_4OVER6_E4M3_USE_256", "all")
    nvfp4_4over6_err_mode: str = _setting("NVTE_NVFP4_4OVER6_ERR_MODE", "MAE")
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    fp4_quant_fwd_inp: QParams = field(init=False)
    """Of activations. These three may be replaced afterwards, as the library's may."""
    fp4_quant_fwd_weight: QParams = field(init=False)
    """Of weights."""
    fp4_quant_bwd_grad: QParams = field(init=False)
    """Of gradients."""

    def __post_init__(self) -> None:
        assert self.fp4_format == Format.E2M1, f"NVFP4 has E2M1 elements, not {self.fp4_format}"
        assert self.fp8_format == Format.E4M3, f"NVFP4 has E4M3 scales, not {self.fp8_format}"
        self.fp4_quant_fwd_inp = QParams(random_hadamard_transform=not self.disable_rht)
        self.fp4_quant_fwd_weight = QParams(fp4_2d_quantization=not self.disable_2d_quantization)
        self.fp4_quant_bwd_grad = QParams(
            random_hadamard_transform=not self.disable_rht,
            stochastic_rounding=not self.disable_stochastic_rounding,
        )


@dataclass
class CustomRecipe(Recipe):
    """Quantizers made by a user's factory, one a tensor role."""

    qfactory: Callable[..., Any]
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False
    quantization_alignment: int = 128
