"""PyTorch modules: linear layers, norms, attention, and the quantization contexts."""

from . import cross_entropy, distributed, fp8, ops, optimizers, quantization, router, tensor
from .attention import DotProductAttention
from .constants import DType
from .grouped_linear import GroupedLinear
from .linear import LayerNormLinear, Linear
from .norm import LayerNorm, RMSNorm
from .padding import Fp8Padding, Fp8Unpadding
from .quantization import (
    QuantizerRole,
    autocast,
    fp8_autocast,
    fp8_model_init,
    quantized_model_init,
)
from .quantized_tensor import Quantizer
from .tensor import HybridQuantizer, IdentityQuantizer, MXFP8Quantizer, NVFP4Quantizer

__all__ = [
    "DType",
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "HybridQuantizer",
    "IdentityQuantizer",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "MXFP8Quantizer",
    "NVFP4Quantizer",
    "Quantizer",
    "QuantizerRole",
    "RMSNorm",
    "autocast",
    "cross_entropy",
    "distributed",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "ops",
    "optimizers",
    "quantization",
    "quantized_model_init",
    "router",
    "tensor",
]
