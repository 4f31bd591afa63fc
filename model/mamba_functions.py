"""The two differentiable functions a Mamba-2 mixer is built from.

`chunk_scan` is the gated state-space scan; `split_conv_scan` is everything between the input
projection and the norm in one autograd node, which stores its input, the scan's output and the
chunk states, recomputes the convolution, and writes every gradient straight into the gradient
of its input. Shape legend: b batch, l time, h head, p head channel, g group, n state, w tap.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.causal_conv import conv_backward, conv_forward
from model.gated_norm import Gate, gate_backward, gate_forward
from model.ssd import ScanInputs, chunk_length, scan_backward, scan_forward
from model.tiling import accumulation_dtype


def time_step(
    dt_blh: Tensor, bias_h: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> Tensor:
    """clamp(softplus(dt + bias), *limit), accumulated."""
    dt = dt_blh.to(accumulation_dtype(dt_blh))
    if bias_h is not None:
        dt = dt + bias_h.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt.clamp(*limit)


def chunk_scan(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_h: Tensor | None,
    z_blhp: Tensor | None,
    initial_bhpn: Tensor | None,
    seq_idx_bl: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scan of positive steps `dt_blh`, gated by silu(z) if z is given.

    Returns:
        y_blhp in x's dtype, and the final state bhpn in float32 (float64 for float64).
    """
    y_blhp, final_bhpn = _Scan.apply(
        x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_bhpn, seq_idx_bl
    )
    if z_blhp is not None:
        y_blhp = Gate.apply(y_blhp.flatten(2), z_blhp.flatten(2)).view(y_blhp.shape)
    return y_blhp, final_bhpn


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_blhp: Tensor,
        dt_blh: Tensor,
        A_h: Tensor,
        B_blgn: Tensor,
        C_blgn: Tensor,
        D_h: Tensor | None,
        initial_bhpn: Tensor | None,
        seq_idx_bl: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = _scan_inputs(x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, seq_idx_bl)
        y_blhp, starts, final_bhpn = scan_forward(inputs, initial_bhpn)
        ctx.save_for_backward(
            x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, initial_bhpn, seq_idx_bl, starts
        )
        ctx.set_materialize_grads(False)
        return y_blhp, final_bhpn

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy_blhp: Tensor | None, dfinal_bhpn: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial, seq_idx, starts = ctx.saved_tensors
        dy_blhp = torch.zeros_like(x) if dy_blhp is None else dy_blhp
        inputs = _scan_inputs(x, dt, A, B, C, D, seq_idx)
        grads = scan_backward(dy_blhp, inputs, starts, dfinal_bhpn)
        return (
            grads.x_blhp,
            _in_dtype_of(dt, grads.dt_blh),
            _in_dtype_of(A, grads.A_h),
            _in_dtype_of(B, grads.B_blgn),
            _in_dtype_of(C, grads.C_blgn),
            _in_dtype_of(D, grads.D_h),
            _in_dtype_of(initial, grads.initial_bhpn),
            None,
        )


def _in_dtype_of(parameter: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return None if parameter is None or grad is None else grad.to(parameter.dtype)


def _scan_inputs(
    x_blhp: Tensor,
    dt_blh: Tensor,
    A_h: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    D_h: Tensor | None,
    seq_idx_bl: Tensor | None,
) -> ScanInputs:
    """The dtypes that the scan wants; x's decides."""
    dtype = accumulation_dtype(x_blhp)
    return ScanInputs(
        x_blhp,
        dt_blh.to(dtype),
        A_h.to(dtype),
        B_blgn.to(x_blhp.dtype),
        C_blgn.to(x_blhp.dtype),
        None if D_h is None else D_h.to(dtype),
        seq_idx_bl,
        chunk_length(B_blgn.shape[-1], x_blhp.shape[-1]),
    )


class Sizes(NamedTuple):
    """Sizes of the parts that the input projection packs as [z | x | B | C | dt]."""

    heads: int
    head_dim: int
    groups: int
    state_dim: int

    @property
    def inner(self) -> int:
        """Width of z and of x."""
        return self.heads * self.head_dim

    @property
    def grouped(self) -> int:
        """Width of B and of C."""
        return self.groups * self.state_dim

    def split(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of z, of [x | B | C] and of dt."""
        z, xbc, dt = zxbcdt.split([self.inner, self.inner + 2 * self.grouped, self.heads], dim=-1)
        return z, xbc, dt

    def split_xbc(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views x_blhp, B_blgn and C_blgn."""
        x, B, C = xbc.split([self.inner, self.grouped, self.grouped], dim=-1)
        return (
            x.unflatten(-1, (self.heads, self.head_dim)),
            B.unflatten(-1, (self.groups, self.state_dim)),
            C.unflatten(-1, (self.groups, self.state_dim)),
        )


class SplitConvScan(torch.autograd.Function):
    """[z | x | B | C | dt] -> silu(z) * scan(silu(conv([x | B | C])), softplus(dt + bias)).

    Without `gated` z is left out (its gradient is zero here) for a norm that gates later.
    Returns y [b, l, h p] in zxbcdt's dtype and the final state bhpn.
    """

    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        conv_weight_cw: Tensor,
        conv_bias_c: Tensor | None,
        dt_bias_h: Tensor,
        A_h: Tensor,
        D_h: Tensor,
        initial_bhpn: Tensor | None,
        seq_idx_bl: Tensor | None,
        sizes: Sizes,
        dt_limit: tuple[float, float],
        silu: bool,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        z, xbc, dt = sizes.split(zxbcdt)
        ctx.sizes, ctx.dt_limit, ctx.silu, ctx.gated = sizes, dt_limit, silu, gated
        x, B, C = sizes.split_xbc(conv_forward(xbc, conv_weight_cw, conv_bias_c, seq_idx_bl, silu))
        step = time_step(dt, dt_bias_h, True, dt_limit)
        inputs = _scan_inputs(x, step, A_h, B, C, D_h, seq_idx_bl)
        y_blhp, starts, final_bhpn = scan_forward(inputs, initial_bhpn)
        y = y_blhp.flatten(2)
        saved = (zxbcdt, conv_weight_cw, conv_bias_c, dt_bias_h, A_h, D_h, initial_bhpn, seq_idx_bl)
        ctx.save_for_backward(*saved, starts, y if gated else None)
        ctx.set_materialize_grads(False)
        return gate_forward(y, z) if gated else y, final_bhpn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal_bhpn: Tensor | None) -> tuple[Any, ...]:
        zxbcdt, conv_weight_cw, conv_bias_c, dt_bias_h, A_h, D_h = ctx.saved_tensors[:6]
        initial_bhpn, seq_idx_bl, starts, y = ctx.saved_tensors[6:]
        sizes: Sizes = ctx.sizes
        z, xbc, dt = sizes.split(zxbcdt)
        dzxbcdt = torch.empty_like(zxbcdt)
        dz, dxbc, ddt = sizes.split(dzxbcdt)
        if dout is None:
            dout = zxbcdt.new_zeros(*zxbcdt.shape[:2], sizes.inner)
        if ctx.gated:
            dy = gate_backward(dout, y, z, dz)
        else:
            dy = dout
            dz.zero_()
        conv = conv_forward(xbc, conv_weight_cw, conv_bias_c, seq_idx_bl, ctx.silu)
        x, B, C = sizes.split_xbc(conv)
        with torch.enable_grad():
            raw = dt.detach().to(accumulation_dtype(dt)).requires_grad_()
            bias = dt_bias_h.detach().requires_grad_()
            step = time_step(raw, bias, True, ctx.dt_limit)
        inputs = _scan_inputs(x, step.detach(), A_h, B, C, D_h, seq_idx_bl)
        # The recomputed convolution is ours alone: its gradient takes its place, still in cache.
        dy_blhp = dy.unflatten(2, x.shape[2:])
        grads = scan_backward(dy_blhp, inputs, starts, dfinal_bhpn, into=(x, B, C))
        draw, dbias = torch.autograd.grad(step, (raw, bias), grads.dt_blh)
        ddt.copy_(draw)
        conv_grads = conv_backward(
            conv, xbc, conv_weight_cw, conv_bias_c, seq_idx_bl, ctx.silu, dx_blc=dxbc
        )
        return (
            dzxbcdt,
            conv_grads.weight,
            conv_grads.bias,
            dbias,
            _in_dtype_of(A_h, grads.A_h),
            _in_dtype_of(D_h, grads.D_h),
            _in_dtype_of(initial_bhpn, grads.initial_bhpn),
            *(None,) * 5,
        )
