"""Depthwise causal convolution over time with an optional SiLU, as Mamba-2 uses it.

    v[b,t,c] = bias[c] + sum_k weight[c, W-1-k] * x[b, t-k, c],   out = silu(v) or v

Shape legend: b batch, l time, c channel, w tap (width W). Channels are the contiguous axis, as
the input projection leaves them: PyTorch's channels-last layout of an image one token high, for
which its depthwise convolution is one pass over memory. (`F.conv1d` wants time contiguous.)
Time is cut into spans that stay in cache, and so is what the backward pass recomputes.

Packed documents: with `seq_idx` a tap whose source token belongs to another document counts as
zero; each tap is then one multiply-add of a shifted view.
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
    width = weight_cw.shape[1]
    out = torch.empty(x_blc.shape, dtype=x_blc.dtype, device=x_blc.device)
    for row, ids, start, end in _pieces(x_blc, seq_idx_bl):
        x_lc = _window(x_blc[row], start - width + 1, end)
        v_lc = _preactivation(x_lc, weight_cw, bias_c, ids, start, end)
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
    dtype, width = accumulation_dtype(x_blc), weight_cw.shape[1]
    dtaps_wc = torch.zeros_like(weight_cw.t(), dtype=dtype)
    dbias = torch.zeros_like(dtaps_wc[0])
    dx_blc = torch.empty_like(x_blc) if dx_blc is None else dx_blc
    for row, ids, start, end in _pieces(x_blc, seq_idx_bl):
        # A token's gradient comes from its own output and those of the W-1 tokens after it.
        reach = end + width - 1
        x_lc = _window(x_blc[row], start - width + 1, reach)
        dv_lc = _window(dout_blc[row], start, reach)
        if silu:
            v_lc = _preactivation(x_lc, weight_cw, bias_c, ids, start, reach)
            dv_lc = torch.ops.aten.silu_backward(dv_lc.to(v_lc.dtype), v_lc)
        dx_blc[row, start:end] = _input_gradient(dv_lc, weight_cw, ids, start, end)
        _add_parameter_gradients(dtaps_wc, dbias, dv_lc[: end - start], x_lc, ids, start)
    return ConvGrads(
        dx_blc,
        dtaps_wc.t().to(weight_cw.dtype),
        None if bias_c is None else dbias.to(bias_c.dtype),
    )


def _pieces(
    x_blc: Tensor, seq_idx_bl: Tensor | None
) -> Iterator[tuple[int, Tensor | None, int, int]]:
    """(batch row, its document numbers [l, 1], first token, last token + 1) of each span."""
    batch, length, channels = x_blc.shape
    for row in range(batch):
        ids_l1 = None if seq_idx_bl is None else seq_idx_bl[row].unsqueeze(-1)
        for start, end in spans(length, channels):
            yield row, ids_l1, start, end


def _preactivation(
    x_lc: Tensor,
    weight_cw: Tensor,
    bias_c: Tensor | None,
    ids_l1: Tensor | None,
    start: int,
    end: int,
) -> Tensor:
    """v of tokens start..end of one row, given x from W-1 tokens before start. In x's dtype, or
    accumulated if there are documents."""
    if ids_l1 is None:
        return _correlate(x_lc, weight_cw, bias_c)
    dtype, width = accumulation_dtype(x_lc), weight_cw.shape[1]
    taps_wc, x_lc = weight_cw.t().to(dtype), x_lc.to(dtype)
    v_lc = x_lc[width - 1 :] * taps_wc[-1]
    for lag in range(1, width):
        tap = width - 1 - lag
        same_l1 = _same_document(ids_l1, start, end, lag)
        v_lc.addcmul_(x_lc[tap : tap + end - start] * same_l1, taps_wc[tap])
    return v_lc if bias_c is None else v_lc.add_(bias_c)


def _input_gradient(
    dv_lc: Tensor, weight_cw: Tensor, ids_l1: Tensor | None, start: int, end: int
) -> Tensor:
    """x's gradient of tokens start..end, given v's up to W-1 tokens after end."""
    if ids_l1 is None:
        return _correlate(dv_lc, weight_cw.flip(1), None)
    width, count = weight_cw.shape[1], end - start
    taps_wc = weight_cw.t().to(dv_lc.dtype)
    dx_lc = dv_lc[:count] * taps_wc[-1]
    for lag in range(1, width):
        later_lc = dv_lc[lag : lag + count] * _same_document(ids_l1, start + lag, end + lag, lag)
        dx_lc.addcmul_(later_lc, taps_wc[width - 1 - lag])
    return dx_lc


def _correlate(x_lc: Tensor, weight_cw: Tensor, bias_c: Tensor | None) -> Tensor:
    """[l + W - 1, c] -> [l, c]: sum_w weight[c, w] x[t + w, c] + bias[c]."""
    kernel_c11w = weight_cw.to(x_lc.dtype)[:, None, None]
    bias_c = None if bias_c is None else bias_c.to(x_lc.dtype)
    # Contiguous as [1, 1, l, c] is what marks the image as channels last.
    image_1c1l = x_lc.contiguous()[None, None].permute(0, 3, 1, 2)
    out_1c1l = F.conv2d(image_1c1l, kernel_c11w, bias_c, groups=x_lc.shape[1])
    return out_1c1l.permute(0, 2, 3, 1)[0, 0]


def _add_parameter_gradients(
    dtaps_wc: Tensor,
    dbias_c: Tensor,
    dv_lc: Tensor,
    x_lc: Tensor,
    ids_l1: Tensor | None,
    start: int,
) -> None:
    """Add the sums over tokens of dv[t] x[t - W + 1 + w], to each tap w, and of dv[t]. Rows of a
    few tokens are added up first, one pass each, and their sum is taken at the end."""
    width, channels = dtaps_wc.shape
    ranges = list(spans(dv_lc.shape[0], (width + 1) * channels))
    sums_wlc = dtaps_wc.new_zeros(width + 1, ranges[0][1], channels)
    for first, last in ranges:
        count = last - first
        dv = dv_lc[first:last].to(dtaps_wc.dtype)
        x = x_lc[first : last + width - 1].to(dtaps_wc.dtype)
        for tap in range(width):
            here = dv
            if ids_l1 is not None:
                lag = width - 1 - tap
                here = dv * _same_document(ids_l1, start + first, start + last, lag)
            sums_wlc[tap, :count].addcmul_(here, x[tap : tap + count])
        sums_wlc[width, :count] += dv
    sums_wc = sums_wlc.sum(1)
    dtaps_wc += sums_wc[:width]
    dbias_c += sums_wc[width]


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
