"""The Mamba-2 scan over a sequence whose segments are on several ranks.

The recurrence is linear in the state, so a segment with incoming state S_in is the same segment
from state zero, plus what S_in adds (notation of ssd.py; s_t sums dt A from the segment's start):

    y_t = y_t(0) + exp(s_t) S_in^T C_t,        S_out = S_out(0) + exp(s_end) S_in

Every rank scans its segments from zero, all ranks gather the summaries (S_out(0), s_end) of all
segments, each runs the short recurrence over segments for its own S_in, and adds the correction.
Before that the last w - 1 tokens of every segment are gathered: the convolution's reach. Bytes
do not depend on the length. The backward pass gathers the gradients of the incoming states and
runs the recurrence the other way:

    R_j = dS_in_j + exp(s_j) R_{j+1},    dS_out(0)_j = R_{j+1},    ds_j = exp(s_j) <S_in_j, R_{j+1}>

Packed documents: where a segment meets another document, s_end is -inf, and so is s_t from there.

The scan and the convolution are mamba-ssm's and causal-conv1d's public functions, so on a GPU
these are the libraries' kernels. Shape legend: b batch, l time, h head, p head channel, g group,
n state, c channel of the convolution, w tap, j segment, k segment of this rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.gated_norm import Gate
from model.mamba_functions import Sizes, time_step
from parallel.context import Segments


class ScanParameters(NamedTuple):
    """What a Mamba-2 mixer has between its input projection and its norm."""

    conv_weight_cw: Tensor
    conv_bias_c: Tensor
    dt_bias_h: Tensor
    A_h: Tensor
    D_h: Tensor
    sizes: Sizes
    chunk_size: int


def scan_segments(
    zxbcdt_blc: Tensor,
    parameters: ScanParameters,
    segments: Segments,
    seq_idx_bl: Tensor | None = None,
) -> Tensor:
    """silu(z) * scan(silu(conv([x | B | C])), softplus(dt + bias)) of this rank's segments.

    Args:
        zxbcdt_blc: [z | x | B | C | dt] of this rank's segments, end to end.
        parameters: the same on every rank.
        segments: which they are. Each is at least w - 1 tokens long.
        seq_idx_bl: int32, the document of every token of the *whole* sequence; None: one.

    Returns:
        y [b, l, h p] of the same tokens.
    """
    z_blc, xbc_blc, dt_blh = parameters.sizes.split(zxbcdt_blc)
    parts = zip(
        segments.own,
        _with_halos(xbc_blc, parameters, segments, seq_idx_bl),
        dt_blh.split(segments.lengths, 1),
        strict=True,
    )
    scanned = [_from_zero(*part, parameters, segments, seq_idx_bl) for part in parts]
    incoming = _Incoming.apply(
        torch.stack([s.final_bhpn for s in scanned]),
        torch.stack([s.log_decay_blh[:, -1] for s in scanned]),
        segments,
    )
    pairs = zip(scanned, incoming, strict=True)
    y_blc = torch.cat([_corrected(s, S, parameters) for s, S in pairs], 1)
    return Gate.apply(y_blc, z_blc)


class _Scanned(NamedTuple):
    """A segment from state zero."""

    y_blhp: Tensor
    final_bhpn: Tensor
    C_blgn: Tensor
    log_decay_blh: Tensor
    """s_t, accumulated; -inf from the first token of another document on."""


def _with_halos(
    xbc_blc: Tensor, parameters: ScanParameters, segments: Segments, seq_idx_bl: Tensor | None
) -> list[Tensor]:
    """Convolve each segment as if the tokens before it were there."""
    from causal_conv1d import causal_conv1d_fn

    reach = parameters.conv_weight_cw.shape[1] - 1
    parts = xbc_blc.split(segments.lengths, 1)
    assert min(segments.lengths) >= reach, "validated: segments reach over the convolution"
    tails = torch.stack([part[:, part.shape[1] - reach :] for part in parts])
    out = []
    for j, halo, part in zip(segments.own, _Halo.apply(tails, segments), parts, strict=True):
        ids = None
        if seq_idx_bl is not None:
            start, end = segments.span(j)
            # Zeros come before the sequence: their document does not matter.
            first = seq_idx_bl[:, :1].expand(-1, reach) if j == 0 else seq_idx_bl[:, :0]
            ids = torch.cat([first, seq_idx_bl[:, max(0, start - reach) : end]], 1).contiguous()
        x_bcl = torch.cat([halo, part], 1).transpose(1, 2)
        weight, bias = parameters.conv_weight_cw, parameters.conv_bias_c
        conv_bcl = causal_conv1d_fn(x_bcl, weight, bias, seq_idx=ids, activation="silu")
        out.append(conv_bcl.transpose(1, 2)[:, reach:])
    return out


def _from_zero(
    j: int,
    xbc_blc: Tensor,
    dt_blh: Tensor,
    parameters: ScanParameters,
    segments: Segments,
    seq_idx_bl: Tensor | None,
) -> _Scanned:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x_blhp, B_blgn, C_blgn = parameters.sizes.split_xbc(xbc_blc)
    step_blh = time_step(dt_blh, parameters.dt_bias_h, True, (0.0, float("inf")))
    log_decay_blh = (step_blh * parameters.A_h).cumsum(1)
    ids_bl = None
    if seq_idx_bl is not None:
        start, end = segments.span(j)
        ids_bl = seq_idx_bl[:, start:end] - seq_idx_bl[:, max(0, start - 1)].unsqueeze(1)
        log_decay_blh = log_decay_blh.masked_fill((ids_bl != 0).unsqueeze(-1), -torch.inf)
    y_blhp, final_bhpn = mamba_chunk_scan_combined(
        x_blhp,
        dt_blh,
        parameters.A_h,
        B_blgn,
        C_blgn,
        parameters.chunk_size,
        D=parameters.D_h,
        dt_bias=parameters.dt_bias_h,
        dt_softplus=True,
        seq_idx=ids_bl,
        return_final_states=True,
    )
    return _Scanned(y_blhp, final_bhpn, C_blgn, log_decay_blh)


def _corrected(scanned: _Scanned, incoming_bhpn: Tensor, parameters: ScanParameters) -> Tensor:
    """y [b, l, h p] with what the incoming state adds."""
    C_bgln = scanned.C_blgn.transpose(1, 2)
    groups = C_bgln.shape[1]
    # A group's heads side by side, as columns of one product.
    state_bgne = incoming_bhpn.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)
    added_bgle = C_bgln @ state_bgne.to(C_bgln.dtype)
    added_blhp = added_bgle.transpose(1, 2).reshape(scanned.y_blhp.shape)
    decay_blh = scanned.log_decay_blh.exp().to(added_blhp.dtype)
    return torch.addcmul(scanned.y_blhp, added_blhp, decay_blh.unsqueeze(-1)).flatten(2)


class _Halo(torch.autograd.Function):
    """Last tokens of this rank's segments [k, b, w - 1, c] -> those before each of them."""

    @staticmethod
    def forward(ctx: Any, tails: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        tails_j = segments.gather(tails)
        return torch.cat([torch.zeros_like(tails_j[:1]), tails_j[:-1]])[list(segments.own)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhalos: Tensor) -> tuple[Tensor, None]:
        dhalos_j = ctx.segments.gather(dhalos)
        later = torch.cat([dhalos_j[1:], torch.zeros_like(dhalos_j[:1])])
        return later[list(ctx.segments.own)], None


class _Incoming(torch.autograd.Function):
    """Summaries [k, b, h, p, n] and [k, b, h] of this rank's segments -> states before them."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, log_decay: Tensor, segments: Segments) -> Tensor:
        packed = torch.cat([final.flatten(-2), log_decay.to(final.dtype).unsqueeze(-1)], -1)
        packed_j = segments.gather(packed)
        final_j, decay_j = packed_j[..., :-1], packed_j[..., -1:].exp()
        states = [torch.zeros_like(final_j[0])]
        for j in range(len(final_j) - 1):
            states.append(torch.addcmul(final_j[j], decay_j[j], states[j]))
        incoming = torch.stack([states[j] for j in segments.own])
        ctx.save_for_backward(incoming, decay_j)
        ctx.segments, ctx.dtype = segments, log_decay.dtype
        return incoming.unflatten(-1, final.shape[-2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dincoming: Tensor) -> tuple[Tensor, Tensor, None]:
        incoming, decay_j = ctx.saved_tensors
        own = list(ctx.segments.own)
        direct_j = ctx.segments.gather(dincoming.flatten(-2))
        after = [torch.zeros_like(direct_j[0])]
        for j in range(len(direct_j) - 1, 0, -1):
            after.append(torch.addcmul(direct_j[j], decay_j[j], after[-1]))
        after.reverse()
        dfinal = torch.stack([after[j] for j in own])
        dlog = (incoming * dfinal).sum(-1) * decay_j[own].squeeze(-1)
        return dfinal.view(dincoming.shape), dlog.to(ctx.dtype), None
