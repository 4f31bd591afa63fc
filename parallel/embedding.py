"""The gradient of an embedding on a host, summed in FP32.

CUDA's kernel sums the rows of one token in FP32. PyTorch's for the CPU adds them one by one in
their own type: in BF16 a token that comes up a thousand times is off by some percent, and the
spaces of a sequence of 262,144 tokens make the whole gradient wrong by half.
"""

import torch
from torch import Tensor

_ROWS = 1 << 14
"""Copied to FP32 at a time."""


def install() -> None:
    """Sum in FP32 from now on, in this process."""
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        _library.impl("embedding_dense_backward", gradient, "CPU")


_library: torch.library.Library | None = None
"""The registration lasts as long as this."""


def gradient(
    grad_output: Tensor,
    indices: Tensor,
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """What `aten::embedding_dense_backward` gives: [num_weights, d], in the type of grad_output.

    Args:
        grad_output: [..., d].
        indices: the tokens, [...].
        num_weights: how many there are.
        padding_idx: a token without a gradient; -1: none.
        scale_grad_by_freq: not implemented.
    """
    if scale_grad_by_freq:
        raise NotImplementedError("the gradient of embedding(scale_grad_by_freq=True) on a host")
    rows, tokens = grad_output.flatten(0, -2), indices.flatten()
    total = torch.zeros(
        num_weights,
        rows.shape[-1],
        dtype=torch.promote_types(grad_output.dtype, torch.float32),
    )
    for own, part in zip(tokens.split(_ROWS), rows.split(_ROWS), strict=True):
        total.index_add_(0, own, part.to(total.dtype))
    if padding_idx >= 0:
        total[padding_idx] = 0
    return total.to(grad_output.dtype)
