"""Depthwise causal convolution over time with an optional SiLU, as Mamba-2 uses it.

    v[b,t,c] = bias[c] + sum_k weight[c, W-1-k] * x[b, t-k, c],   out = silu(v) or v

Shape legend: b batch, l time, c channel, w tap (width W). Channels are the contiguous axis, as
the input projection leaves them; each tap is one multiply-add of a shifted view, and time is
cut into spans that stay in cache. `F.conv1d` wants time contiguous and is slower on CPU.

Packed documents: with `seq_idx` a tap whose source token belongs to another document counts as
zero. The backward pass recomputes v instead of storing it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.tiling import accumulation_dtype, spans


class ConvGrads(NamedTuple):
    """Gradients of `conv_forward`'s inputs, in the inputs' dtypes."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


def conv_forward(
    x_blc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    seq_idx_bl: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Convolve every channel with its own taps.

    Args:
        x_blc: input, any strides with contiguous channels.
        weight_cw: taps, oldest first (PyTorch's convention for `Conv1d`).
        bias_c: added to every token, or None.
        seq_idx_bl: document number of each token, or None for one document per row.
        silu: apply SiLU to the result.

    Returns:
        out_blc, contiguous, in x's dtype.
    """
    taps_wc, bias = _parameters(x_blc, weight_cw, bias_c)
    width = taps_wc.shape[0]
    out = torch.empty(x_blc.shape, dtype=x_blc.dtype, device=x_blc.device)
    for row, ids in _rows(seq_idx_bl, x_blc.shape[0]):
        for start, end in spans(*x_blc.shape[1:]):
            x_lc = _window(x_blc[row], start - width + 1, end).to(taps_wc.dtype)
            v_lc = _preactivation(x_lc, taps_wc, bias, ids, start, end)
            out[row, start:end] = F.silu(v_lc, inplace=True) if silu else v_lc
    return out


def conv_backward(
    dout_blc: Tensor,
    x_blc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    seq_idx_bl: Tensor | None = None,
    silu: bool = True,
    dx_blc: Tensor | None = None,
) -> ConvGrads:
    """Gradients of `conv_forward`. `dx_blc`, if given, receives x's gradient in place."""
    taps_wc, bias = _parameters(x_blc, weight_cw, bias_c)
    width = taps_wc.shape[0]
    dtaps_wc, dbias = torch.zeros_like(taps_wc), torch.zeros_like(bias)
    dx_blc = torch.empty_like(x_blc) if dx_blc is None else dx_blc
    for row, ids in _rows(seq_idx_bl, x_blc.shape[0]):
        for start, end in spans(*x_blc.shape[1:]):
            # A token's gradient comes from its own output and those of the W-1 tokens after it.
            count, reach = end - start, end + width - 1
            x_lc = _window(x_blc[row], start - width + 1, reach).to(taps_wc.dtype)
            dv_lc = _window(dout_blc[row], start, reach).to(taps_wc.dtype)
            if silu:
                v_lc = _preactivation(x_lc, taps_wc, bias, ids, start, reach)
                dv_lc = torch.ops.aten.silu_backward(dv_lc, v_lc)
            dbias += dv_lc[:count].sum(0)
            dx_lc = dv_lc[:count] * taps_wc[-1]
            dtaps_wc[-1] += (dv_lc[:count] * x_lc[width - 1 : width - 1 + count]).sum(0)
            for lag in range(1, width):
                tap = width - 1 - lag
                dv_here, dv_later = dv_lc[:count], dv_lc[lag : lag + count]
                if ids is not None:
                    dv_here = dv_here * _same_document(ids, start, end, lag)
                    dv_later = dv_later * _same_document(ids, start + lag, end + lag, lag)
                dtaps_wc[tap] += (dv_here * x_lc[tap : tap + count]).sum(0)
                dx_lc.addcmul_(dv_later, taps_wc[tap])
            dx_blc[row, start:end] = dx_lc
    return ConvGrads(
        dx_blc,
        dtaps_wc.t().to(weight_cw.dtype),
        None if bias_c is None else dbias.to(bias_c.dtype),
    )


def _parameters(x: Tensor, weight_cw: Tensor, bias_c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Taps as contiguous rows and the bias, in the accumulation dtype."""
    dtype = accumulation_dtype(x)
    taps = weight_cw.t().to(dtype).contiguous()
    return taps, torch.zeros_like(taps[0]) if bias_c is None else bias_c.to(dtype)


def _rows(seq_idx_bl: Tensor | None, batch: int) -> Iterator[tuple[int, Tensor | None]]:
    """Batch rows with their document numbers [l, 1]."""
    for row in range(batch):
        yield row, None if seq_idx_bl is None else seq_idx_bl[row].unsqueeze(-1)


def _preactivation(
    x_lc: Tensor, taps_wc: Tensor, bias_c: Tensor, ids_l1: Tensor | None, start: int, end: int
) -> Tensor:
    """v of tokens start..end of one row, given x from W-1 tokens before start."""
    last, count = taps_wc.shape[0] - 1, end - start
    v_lc = torch.addcmul(bias_c, x_lc[last : last + count], taps_wc[last])
    for tap in range(last):
        x_tap = x_lc[tap : tap + count]
        if ids_l1 is not None:
            x_tap = x_tap * _same_document(ids_l1, start, end, last - tap)
        v_lc.addcmul_(x_tap, taps_wc[tap])
    return v_lc


def _window(t_lc: Tensor, start: int, end: int) -> Tensor:
    """Tokens start..end, with zeros before the first and after the last one."""
    length = t_lc.shape[0]
    before = min(end, 0) - min(start, 0)
    after = max(end, length) - max(start, length)
    inside = t_lc[start + before : end - after]
    return F.pad(inside, (0, 0, before, after)) if before or after else inside


def _same_document(ids_l1: Tensor, start: int, end: int, lag: int) -> Tensor:
    """[end - start, 1]: whether tokens start..end and those `lag` earlier share a document."""
    return _window(ids_l1, start, end) == _window(ids_l1, start - lag, end - lag)


class CausalConv(torch.autograd.Function):
    """`conv_forward` with its gradients: (x_blc, weight_cw, bias_c, seq_idx_bl, silu) -> out."""

    @staticmethod
    def forward(
        ctx: Any,
        x_blc: Tensor,
        weight_cw: Tensor,
        bias_c: Tensor | None,
        seq_idx_bl: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_blc, weight_cw, bias_c, seq_idx_bl)
        ctx.silu = silu
        return conv_forward(x_blc, weight_cw, bias_c, seq_idx_bl, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_blc: Tensor) -> tuple[Tensor | None, ...]:
        x_blc, weight_cw, bias_c, seq_idx_bl = ctx.saved_tensors
        grads = conv_backward(dout_blc, x_blc, weight_cw, bias_c, seq_idx_bl, ctx.silu)
        return grads.x, grads.weight, grads.bias, None, None
