"""What a host does instead of torch.compile for Megatron's pointwise functions.

Compiling would build C++ at the first step. Running the functions plainly moves every
intermediate result through memory; the two below, which work on the widest activations of a
mixture-of-experts model, are written so that those results stay in cache.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FORWARD_ELEMENTS, _BACKWARD_ELEMENTS = 1 << 19, 1 << 17
"""Elements of a block, measured: the forward pass has one temporary, the backward pass four."""


def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator in the place of torch.compile: a version of our own for the functions that
    have one, every other function as it is."""
    return _VERSIONS.get(getattr(function, "__name__", ""), function)


def weighted_squared_relu(x: Tensor, weights: Tensor) -> Tensor:
    """relu(x)^2 * weights, computed in FP32, in x's dtype.

    Args:
        x: [t, m].
        weights: [t, 1].
    """
    out = torch.empty_like(x)
    for rows in _blocks(x, _FORWARD_ELEMENTS):
        positive = F.relu(x[rows]).float()
        out[rows] = positive.mul_(positive).mul_(weights[rows])
    return out


def weighted_squared_relu_back(g: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, 2 relu(x) weights g, and of the weights, sum over m of relu(x)^2 g."""
    dx, dw = torch.empty_like(x), torch.empty_like(weights)
    for rows in _blocks(x, _BACKWARD_ELEMENTS):
        positive = F.relu(x[rows]).float()
        flow = g[rows].float() * positive
        dw[rows] = torch.linalg.vecdot(flow, positive).unsqueeze(1)
        dx[rows] = flow.mul_(weights[rows] * 2)
    return dx, dw


def _blocks(x: Tensor, elements: int) -> Iterator[slice]:
    rows = max(1, elements // x.shape[-1])
    return (slice(i, i + rows) for i in range(0, x.shape[0], rows))


_VERSIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (weighted_squared_relu, weighted_squared_relu_back)
}
