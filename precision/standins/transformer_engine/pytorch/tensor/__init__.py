"""Quantizers. No tensor of this stand-in is itself quantized: modules keep operands."""

import torch

from .hybrid_tensor import HybridQuantizer
from .identity_tensor import IdentityQuantizer
from .mxfp8_tensor import MXFP8Quantizer
from .nvfp4_tensor import NVFP4Quantizer


class QuantizedTensor(torch.Tensor):
    """No tensor of this stand-in is one: isinstance checks answer no."""


__all__ = [
    "HybridQuantizer",
    "IdentityQuantizer",
    "MXFP8Quantizer",
    "NVFP4Quantizer",
    "QuantizedTensor",
]
