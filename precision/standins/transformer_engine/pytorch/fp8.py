"""The older name of `quantization`, which Megatron-Core imports."""

from .quantization import (
    FP8GlobalStateManager,
    autocast,
    fp8_autocast,
    fp8_model_init,
    quantized_model_init,
)

__all__ = [
    "FP8GlobalStateManager",
    "autocast",
    "fp8_autocast",
    "fp8_model_init",
    "quantized_model_init",
]
