"""The random Hadamard transform of NVFP4's weight-gradient operands.

Tokens are cut into groups of 16 and each group is multiplied by the orthogonal matrix
R = diag(s) H16 / 4, with Sylvester's H16 and one fixed vector of signs s (arXiv 2509.25149,
section 4.2; the signs are Transformer Engine's). An outlier is spread over its group, and in
dW = G^T X, where both factors are transformed along the tokens that are summed over, R cancels.
"""

import torch
from torch import Tensor

SIZE = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def matrix(dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """R, [16, 16]; its entries, +-1/4, are exact in every dtype."""
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    signs = torch.tensor(SIGNS, dtype=h.dtype)
    return (signs[:, None] * h / 4).to(device=device, dtype=dtype)


def transform(x: Tensor) -> Tensor:
    """x, [tokens, features] -> R^T x_g for each group x_g of 16 tokens, in the dtype of x.

    Sums run in FP32 and are rounded once, as Transformer Engine's kernel does in BF16 (it takes
    nothing else).

    Raises:
        ValueError: the tokens do not divide into groups of 16.
    """
    return _apply(matrix(x.dtype, x.device).t(), x)


def inverse(x: Tensor) -> Tensor:
    """Undo `transform`: R x_g."""
    return _apply(matrix(x.dtype, x.device), x)


def _apply(rotation: Tensor, x: Tensor) -> Tensor:
    tokens, features = x.shape
    if tokens % SIZE:
        raise ValueError(f"{tokens} tokens % {SIZE} = {tokens % SIZE}: no whole Hadamard groups")
    if not x.numel():
        return x
    groups = x.reshape(-1, SIZE, features)
    return torch.bmm(rotation.expand(len(groups), SIZE, SIZE), groups).view(tokens, features)
