"""What a host does instead of torch.compile for Megatron's pointwise functions.

Compiling would build C++ at the first step. Running them plainly moves each intermediate
result through memory; for the functions whose rows are independent, running them on blocks
of rows keeps those results in cache. The bits are the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWWISE = ("weighted_squared_relu", "weighted_squared_relu_back")
"""Functions of Megatron whose result rows depend on the same rows of their arguments only."""

_BLOCK_ELEMENTS = 1 << 16
"""Elements of one argument in a block: 256 KiB in FP32."""


def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator in the place of torch.compile: blocks the functions named in ROWWISE and
    leaves every other one as it is."""
    if getattr(function, "__name__", "") not in ROWWISE:
        return function

    @functools.wraps(function)
    def blocked(*tensors: Tensor) -> Any:
        rows = max(1, _BLOCK_ELEMENTS // tensors[0].shape[-1])
        if tensors[0].dim() != 2 or tensors[0].shape[0] <= rows:
            return function(*tensors)
        parts = [function(*p) for p in zip(*(t.split(rows) for t in tensors), strict=True)]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return torch.cat(parts)

    return blocked
