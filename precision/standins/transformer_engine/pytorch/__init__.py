"""PyTorch modules: linear layers, norms, attention, and the quantization contexts."""

from . import cross_entropy, distributed, ops, optimizers, router, tensor
from .attention import DotProductAttention
from .fp8 import autocast, fp8_autocast, fp8_model_init, quantized_model_init
from .grouped_linear import GroupedLinear
from .linear import LayerNormLinear, Linear
from .norm import LayerNorm, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "autocast",
    "cross_entropy",
    "distributed",
    "fp8_autocast",
    "fp8_model_init",
    "ops",
    "optimizers",
    "quantized_model_init",
    "router",
    "tensor",
]
