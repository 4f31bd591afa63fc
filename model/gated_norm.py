"""SiLU gate and RMS norm over groups of channels, as Mamba-2 ends its mixer.

Shape legend: t any token axes, c channel = (g d), g group, d channel of a group. Sums are
float32 (float64 for float64 inputs). Both work in spans of tokens that stay in cache and
recompute in the backward pass what is cheap to recompute.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.tiling import accumulation_dtype, spans


def gate_forward(y_blc: Tensor, z_blc: Tensor) -> Tensor:
    """y * silu(z), contiguous, in y's dtype."""
    out = torch.empty(y_blc.shape, dtype=y_blc.dtype, device=y_blc.device)
    for rows in _rows(y_blc):
        y, z = y_blc[rows], z_blc[rows]
        out[rows] = F.silu(z.to(accumulation_dtype(z))) * y
    return out


def gate_backward(dout_blc: Tensor, y_blc: Tensor, z_blc: Tensor, dz_blc: Tensor) -> Tensor:
    """Writes z's gradient into `dz_blc` and returns y's."""
    dy = torch.empty(y_blc.shape, dtype=y_blc.dtype, device=y_blc.device)
    for rows in _rows(y_blc):
        z = z_blc[rows].to(accumulation_dtype(z_blc))
        dout = dout_blc[rows]
        dy[rows] = F.silu(z) * dout
        dz_blc[rows] = torch.ops.aten.silu_backward(dout.to(z.dtype) * y_blc[rows], z)
    return dy


class Gate(torch.autograd.Function):
    """`gate_forward` with its gradients: (y_blc, z_blc) -> out_blc."""

    @staticmethod
    def forward(ctx: Any, y_blc: Tensor, z_blc: Tensor) -> Tensor:
        ctx.save_for_backward(y_blc, z_blc)
        return gate_forward(y_blc, z_blc)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_blc: Tensor) -> tuple[Tensor, Tensor]:
        y_blc, z_blc = ctx.saved_tensors
        dz_blc = torch.empty_like(z_blc)
        return gate_backward(dout_blc, y_blc, z_blc, dz_blc), dz_blc


def group_rms_norm(x_tc: Tensor, weight_c: Tensor, eps: float, group_size: int) -> Tensor:
    """x / rms(x over its group) * weight, in x's dtype."""
    return _GroupRMSNorm.apply(x_tc, weight_c, eps, group_size)


class _GroupRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tc: Tensor, weight_c: Tensor, eps: float, group_size: int) -> Tensor:
        x_nc = x_tc.reshape(-1, x_tc.shape[-1])
        ctx.group_size = group_size
        out = torch.empty_like(x_nc)
        dtype = accumulation_dtype(x_nc)
        weight_gd = weight_c.to(dtype).unflatten(0, (-1, group_size))
        scale_ng1 = torch.empty(x_nc.shape[0], *weight_gd.shape[:1], 1, dtype=dtype)
        for start, end in spans(*x_nc.shape):
            x_ngd = x_nc[start:end].to(dtype).unflatten(1, weight_gd.shape)
            scale = x_ngd.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            scale_ng1[start:end] = scale
            out[start:end] = (x_ngd * scale).mul_(weight_gd).flatten(1)
        ctx.save_for_backward(x_nc, weight_c, scale_ng1)
        return out.view(x_tc.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_tc: Tensor) -> tuple[Tensor | None, ...]:
        x_nc, weight_c, scale_ng1 = ctx.saved_tensors
        dout_nc = dout_tc.reshape(x_nc.shape)
        dtype = scale_ng1.dtype
        weight_gd = weight_c.to(dtype).unflatten(0, (-1, ctx.group_size))
        dx, dweight_gd = torch.empty_like(x_nc), torch.zeros_like(weight_gd)
        for start, end in spans(*x_nc.shape):
            scale = scale_ng1[start:end]
            unit_ngd = x_nc[start:end].to(dtype).unflatten(1, weight_gd.shape) * scale
            dout_ngd = dout_nc[start:end].to(dtype).unflatten(1, weight_gd.shape)
            dscaled = dout_ngd * unit_ngd
            dweight_gd += dscaled.sum(0)
            # The part of the gradient along x only changes its length, which the norm undoes.
            along = dscaled.mul_(weight_gd).mean(-1, keepdim=True)
            dunit = (dout_ngd * weight_gd).addcmul_(unit_ngd, along, value=-1)
            dx[start:end] = dunit.mul_(scale).flatten(1)
        return dx.view(dout_tc.shape), dweight_gd.flatten().to(weight_c.dtype), None, None


def _rows(t_blc: Tensor) -> list[tuple[slice, slice]]:
    """Index of each span of tokens, all batch rows together."""
    batch, length, channels = t_blc.shape
    return [(slice(None), slice(start, end)) for start, end in spans(length, batch * channels)]
