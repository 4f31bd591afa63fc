"""RMSNorm, computed in FP32 (FP64 for FP64 input) like the real library's kernel."""

from typing import Any

import torch
from torch import Tensor, nn

from .module import refuse


class _RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension (arXiv 1910.07467, eq. 4).

    Saves the input and one number a row; the normalised values are computed again in the
    backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        grad = grad.to(scale.dtype)
        dw = dx = None
        if ctx.needs_input_grad[1]:
            dw = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad = grad * weight.to(scale.dtype)
            along = (grad * normed).mean(-1, keepdim=True)
            dx = grad.addcmul_(normed, along, value=-1.0).mul_(scale).to(x.dtype)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x over its last dimension, scaled by `weight`; dtype of x."""
    return _RMSNorm.apply(x, weight, eps)


class RMSNorm(nn.Module):
    """Mirrors `transformer_engine.pytorch.RMSNorm` for one normalised dimension."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cpu",
        **unsupported: Any,
    ) -> None:
        super().__init__()
        refuse("RMSNorm", zero_centered_gamma=zero_centered_gamma, **unsupported)
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Not used by the Nemotron 3 family."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "the Transformer Engine stand-in does not implement LayerNorm; use RMSNorm"
        )
