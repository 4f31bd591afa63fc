"""The gradient of an embedding against sums in FP64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.embedding import install


def zipf(count: int) -> tuple[Tensor, Tensor]:
    """Tokens as a text has them, a few of them most of it, and gradients with a mean."""
    generator = torch.Generator().manual_seed(1)
    share = 1 / torch.arange(1, 501)
    tokens = torch.multinomial(share, count, replacement=True, generator=generator)
    noise = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    return tokens.view(2, -1), (noise + 0.3).view(2, -1, 8)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-3), (torch.float32, 1e-5)])
def test_the_gradient_is_rounded_once(dtype: torch.dtype, bound: float) -> None:
    install()
    tokens, up = zipf(65536)
    up = up.to(dtype)
    weight = torch.zeros(500, 8, dtype=dtype, requires_grad=True)
    F.embedding(tokens, weight).backward(up)
    exact = F.one_hot(tokens.flatten()).double().T @ up.flatten(0, 1).double()
    assert weight.grad is not None and weight.grad.dtype == dtype
    assert ((weight.grad - exact).norm() / exact.norm()).item() < bound


def test_padding_has_none_and_scaling_is_refused() -> None:
    install()
    tokens, up = zipf(64)
    weight = torch.zeros(500, 8, dtype=torch.float64, requires_grad=True)
    padding = int(tokens[0, 0])
    F.embedding(tokens, weight, padding_idx=padding).backward(up)
    exact = F.one_hot(tokens.flatten(), 500).double().T @ up.flatten(0, 1)
    exact[padding] = 0
    torch.testing.assert_close(weight.grad, exact)
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq"):
        F.embedding(tokens, weight, scale_grad_by_freq=True).backward(up)
