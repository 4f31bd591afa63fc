"""Chunked state-space duality: the Mamba-2 recurrence as matrix products, in plain PyTorch.

For every head, with step dt_t > 0, decay rate A < 0 and state S of shape [n, p] (Mamba-2 paper,
arXiv 2405.21060, equation 1 and section 6):

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T,        y_t = S_t^T C_t + D x_t

Inside a chunk of q tokens, with s_t the running sum of dt A, the same is

    y = M x + exp(s) C S_in,   M_ij = (C_i . B_j) exp(s_i - s_j) dt_j  for j <= i  (+ D on i = j)
    S_out = exp(s_q) S_in + sum_j exp(s_q - s_j) dt_j B_j x_j^T

Shape legend: b batch, l time, h head, p head channel, g group, r head of a group (h = g r),
n state, q token of a chunk, m chunk of a block, k = (m b g), e = (r p). B and C belong to
groups and are never repeated for heads: a group's heads are columns of one matrix product.

Only a block of a few chunks is expanded at a time, forward and backward, so memory is linear in
the sequence length; kept for backward is the state at each chunk's start. The last, shorter
chunk is a block of its own: no padding. Chunks and blocks are an internal choice that the result
does not depend on. Sums, decays and the carried state are float32 (float64 for float64 inputs);
matrix products run in x's dtype, and so does the weighting of tokens that enter or leave a chunk.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.tiling import accumulation_dtype

BLOCK_ELEMENTS = 1 << 20
"""Elements of a block's largest temporary, so that a few of them share the last-level cache."""

TINY_STEP = 1e-20
"""Floor of dt under its logarithm: a step of zero stays finite, and as good as zero."""

LOG2_E = 1.4426950408889634
"""Decays are powers of two: exp2 is four times faster than exp on CPU."""


class ScanInputs(NamedTuple):
    """What the recurrence reads. x, B and C have one dtype; dt, A and D are accumulated."""

    x_blhp: Tensor
    dt_blh: Tensor
    A_h: Tensor
    B_blgn: Tensor
    C_blgn: Tensor
    D_h: Tensor | None
    seq_idx_bl: Tensor | None
    """Document of each token: no influence crosses a change of it. None: one document a row."""
    chunk_len: int
    """Tokens per chunk; changes the speed, not the result. See `chunk_length`."""


class ScanGrads(NamedTuple):
    """Gradients of `ScanInputs` and of the initial state; dt, A, D, state are accumulated."""

    x_blhp: Tensor
    dt_blh: Tensor
    A_h: Tensor
    B_blgn: Tensor
    C_blgn: Tensor
    D_h: Tensor | None
    initial_bhpn: Tensor


def chunk_length(state_dim: int, head_dim: int) -> int:
    """Fastest chunk, measured: M costs its length, states n p / length, so the power of two below
    sqrt(n p), where both are about equal."""
    return max(16, 1 << (math.isqrt(state_dim * head_dim).bit_length() - 1))


def scan_forward(
    inputs: ScanInputs, initial_bhpn: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence over the whole sequence.

    Args:
        inputs: see `ScanInputs`.
        initial_bhpn: state before the first token, zero if None. With `seq_idx_bl` it belongs
            to document 0, as in mamba-ssm.

    Returns:
        y_blhp, contiguous, in x's dtype; the state at each chunk's start [chunk, b, g, n, e] in
        x's dtype, for `scan_backward`; the final state bhpn, accumulated.
    """
    x_blhp = inputs.x_blhp
    batch, length, heads, head_dim = x_blhp.shape
    groups, state_dim = inputs.B_blgn.shape[2:]
    y_blhp = torch.empty(x_blhp.shape, dtype=x_blhp.dtype, device=x_blhp.device)
    state_shape = (batch, groups, state_dim, heads // groups * head_dim)
    state = y_blhp.new_zeros(state_shape, dtype=accumulation_dtype(x_blhp))
    if initial_bhpn is not None:
        state += _group_state(initial_bhpn, groups)
    starts = y_blhp.new_empty(-(-length // inputs.chunk_len), *state_shape)
    for span in _spans(inputs):
        block = _Block(inputs, span)
        entering = torch.bmm(block.B_kqn.mT, block.by_token(block.x_krqp, block.decay_out_krq))
        for i, added in enumerate(block.unfold(entering)):
            starts[span.first + i] = state
            state = torch.addcmul(added.to(state.dtype), state, block.total_mbg1e[i])
        within = block.mixing(block.decay(), inputs.D_h) @ block.x_krqp
        carried = block.by_head(torch.bmm(block.C_kqn, block.states(starts)))
        block.store(y_blhp, within, carried, block.decay_in_krq)
    return y_blhp, starts, _head_state(state, heads)


def scan_backward(
    dy_blhp: Tensor,
    inputs: ScanInputs,
    starts: Tensor,
    dfinal_bhpn: Tensor | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> ScanGrads:
    """Gradients of `scan_forward`, block by block from the end.

    Args:
        dy_blhp: gradient of y.
        inputs: as in the forward pass.
        starts: the states that the forward pass returned.
        dfinal_bhpn: gradient of the final state, or None.
        into: tensors that receive the gradients of x, B and C, or None to allocate them. They
            may be x, B and C themselves: a block is read before it is written.
    """
    x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, *_ = inputs
    groups = B_blgn.shape[2]
    dx, dB, dC = into or (torch.empty_like(t) for t in (x_blhp, B_blgn, C_blgn))
    ddt, dA, dD = torch.empty_like(dt_blh), torch.zeros_like(A_h), None
    dstate = torch.zeros_like(starts[0], dtype=dt_blh.dtype)
    if dfinal_bhpn is not None:
        dstate += _group_state(dfinal_bhpn, groups)
    if D_h is not None:
        dD = torch.zeros_like(D_h)
    for span in reversed(list(_spans(inputs))):
        block = _Block(inputs, span)
        dy_krqp = span.heads(dy_blhp, groups).reshape(block.x_krqp.shape)
        inner = _within_chunks(block, dy_krqp, D_h)
        outer, dstate = _between_chunks(block, dy_krqp, block.states(starts), dstate)
        block.store(dx, inner.dx_krqp, outer.dx_krqp, block.decay_out_krq)
        dB_kqn = torch.baddbmm(outer.dB_kqn, inner.dCB_kqq.mT, block.C_kqn)
        dC_kqn = torch.baddbmm(outer.dC_kqn, inner.dCB_kqq, block.B_kqn)
        span.groups(dB).copy_(block.unfold(dB_kqn))
        span.groups(dC).copy_(block.unfold(dC_kqn))
        dlog_krq = inner.dlog_dt_krq + outer.dlog_dt_krq
        # s is a running sum of dt A, so a step's gradient is the sum over all later s.
        da_krq = (inner.ds_krq + outer.ds_krq).flip(-1).cumsum(-1).flip(-1)
        ddt_krq = da_krq * block.A_kr1 + dlog_krq / block.dt_krq
        span.steps(ddt, groups).copy_(block.unfold(ddt_krq))
        dA += (da_krq * block.dt_krq).sum(-1).view(-1, A_h.numel()).sum(0)
        if dD is not None:
            dD += inner.dD_kr.view(-1, dD.numel()).sum(0)
    return ScanGrads(dx, ddt, dA, dB, dC, dD, _head_state(dstate, x_blhp.shape[2]))


class _Span(NamedTuple):
    """Consecutive chunks that are worked on together, and how to view tensors chunk by chunk."""

    first: int
    """Index of the first chunk."""
    start: int
    """Index of the first token."""
    num_chunks: int
    """How many, m."""
    chunk_len: int
    """Tokens in each, q."""

    def rows(self, t_bl: Tensor) -> Tensor:
        """[b, l, ...] -> [b, m, q, ...]"""
        tokens = slice(self.start, self.start + self.num_chunks * self.chunk_len)
        return t_bl[:, tokens].unflatten(1, (self.num_chunks, self.chunk_len))

    def heads(self, t_blhp: Tensor, groups: int) -> Tensor:
        """-> [m, b, g, r, q, p]"""
        return self.rows(t_blhp).unflatten(3, (groups, -1)).permute(1, 0, 3, 4, 2, 5)

    def groups(self, t_blgn: Tensor) -> Tensor:
        """-> [m, b, g, q, n]"""
        return self.rows(t_blgn).permute(1, 0, 3, 2, 4)

    def steps(self, t_blh: Tensor, groups: int) -> Tensor:
        """-> [m, b, g, r, q]"""
        return self.rows(t_blh).unflatten(3, (groups, -1)).permute(1, 0, 3, 4, 2)


def _spans(inputs: ScanInputs) -> Iterator[_Span]:
    """Cut the sequence into blocks of whole chunks and, if need be, one shorter chunk."""
    batch, length, heads, head_dim = inputs.x_blhp.shape
    chunk_len = inputs.chunk_len
    widest = max(chunk_len, head_dim) * chunk_len * heads * batch
    limit = max(1, BLOCK_ELEMENTS // widest)
    whole, tail = divmod(length, chunk_len)
    for chunk in range(0, whole, limit):
        yield _Span(chunk, chunk * chunk_len, min(limit, whole - chunk), chunk_len)
    if tail:
        yield _Span(whole, whole * chunk_len, 1, tail)


class _Block:
    """The inputs of one span in matrix-product layout, and its decays."""

    def __init__(self, inputs: ScanInputs, span: _Span) -> None:
        batch, _, heads, _ = inputs.x_blhp.shape
        groups = inputs.B_blgn.shape[2]
        self.span = span
        self.lead = (span.num_chunks, batch, groups)
        self.x_krqp = span.heads(inputs.x_blhp, groups).flatten(0, 2).contiguous()
        self.B_kqn = span.groups(inputs.B_blgn).flatten(0, 2).contiguous()
        self.C_kqn = span.groups(inputs.C_blgn).flatten(0, 2).contiguous()
        self.CB_kqq = torch.bmm(self.C_kqn, self.B_kqn.mT)
        rate_gr1 = inputs.A_h.view(groups, heads // groups, 1)
        self.A_kr1 = rate_gr1.repeat(span.num_chunks * batch, 1, 1)
        self.dt_krq = span.steps(inputs.dt_blh, groups).flatten(0, 2).clamp_min(TINY_STEP)
        self._s_krq = (self.dt_krq * (self.A_kr1 * LOG2_E)).cumsum(-1)
        self._source_krq = self._s_krq - self.dt_krq.log2()
        self.decay_in_krq = self._s_krq.exp2()
        """exp(s): from the chunk's start to a token."""
        self.decay_out_krq = (self._s_krq[..., -1:] - self._source_krq).exp2()
        """dt exp(s_q - s): from a token to the chunk's end, with the token's step."""
        self._same_k1qq: Tensor | None = None
        if inputs.seq_idx_bl is not None:
            self._separate_documents(inputs.seq_idx_bl)
        total_kr1 = self.decay_in_krq[..., -1:]
        head_dim = self.x_krqp.shape[-1]
        self.total_mbg1e = self.unfold(total_kr1.expand(-1, -1, head_dim).flatten(1).unsqueeze(1))
        """Decay over the whole chunk, for each column of the state."""

    def _separate_documents(self, seq_idx_bl: Tensor) -> None:
        """Cut the decays wherever a path between two tokens crosses into another document."""
        span = self.span
        ends = torch.arange(span.num_chunks, device=seq_idx_bl.device) * span.chunk_len + span.start
        before_bm = seq_idx_bl[:, (ends - 1).clamp_min(0)]
        if span.start == 0:
            before_bm[:, 0] = 0
        ids_bmq = span.rows(seq_idx_bl)

        def per_group(t_bmq: Tensor) -> Tensor:
            return t_bmq.transpose(0, 1).unsqueeze(2).expand(*self.lead, -1).flatten(0, 2)

        ids_k1q = per_group(ids_bmq).unsqueeze(1)
        before_k11 = per_group(before_bm.unsqueeze(-1)).unsqueeze(1)
        self.decay_in_krq *= ids_k1q == before_k11
        self.decay_out_krq *= ids_k1q == ids_k1q[..., -1:]
        self._same_k1qq = ids_k1q.unsqueeze(-1) == ids_k1q.unsqueeze(-2)

    def decay(self) -> Tensor:
        """exp(s_i - s_j) dt_j for j <= i, else zero: [k, r, q, q]."""
        decay = (self._s_krq.unsqueeze(-1) - self._source_krq.unsqueeze(-2)).exp2_().tril_()
        return decay if self._same_k1qq is None else decay.mul_(self._same_k1qq)

    def mixing(self, decay_krqq: Tensor, D_h: Tensor | None) -> Tensor:
        """M of the module's docstring, in x's dtype."""
        M_krqq = decay_krqq * self.CB_kqq.unsqueeze(1)
        if D_h is not None:
            skip_kr1 = D_h.view(self.lead[2], -1, 1).repeat(self.lead[0] * self.lead[1], 1, 1)
            M_krqq.diagonal(dim1=-2, dim2=-1).add_(skip_kr1)
        return M_krqq.to(self.x_krqp.dtype)

    def by_token(self, t_krqp: Tensor, weight_krq: Tensor) -> Tensor:
        """Weighted and with a group's heads side by side: [k, q, e] in x's dtype."""
        k, r, q, p = t_krqp.shape
        out_kqrp = torch.empty(k, q, r, p, dtype=t_krqp.dtype, device=t_krqp.device)
        weight = weight_krq.to(t_krqp.dtype).unsqueeze(-1)
        torch.mul(t_krqp, weight, out=out_kqrp.transpose(1, 2))
        return out_kqrp.flatten(2)

    def by_head(self, t_kqe: Tensor) -> Tensor:
        """[k, q, e] -> [k, r, q, p], a view."""
        return t_kqe.unflatten(2, (-1, self.x_krqp.shape[-1])).transpose(1, 2)

    def store(
        self, out_blhp: Tensor, base_krqp: Tensor, t_krqp: Tensor, weight_krq: Tensor
    ) -> None:
        """Write base + weight t into this span of `out_blhp`."""
        out = self.span.heads(out_blhp, self.lead[2])
        weight_krq1 = weight_krq.to(out.dtype).unsqueeze(-1)
        base, t, weight = (self.unfold(v) for v in (base_krqp, t_krqp, weight_krq1))
        torch.addcmul(base, t, weight, out=out)

    def unfold(self, t_k: Tensor) -> Tensor:
        """[k, ...] -> [m, b, g, ...], a view."""
        return t_k.unflatten(0, self.lead)

    def states(self, starts: Tensor) -> Tensor:
        """The span's part of the states at chunk starts: [k, n, e]."""
        return starts[self.span.first : self.span.first + self.span.num_chunks].flatten(0, 2)


class _InnerGrads(NamedTuple):
    """What flows through M: within the chunks."""

    dx_krqp: Tensor
    dCB_kqq: Tensor
    ds_krq: Tensor
    dlog_dt_krq: Tensor
    dD_kr: Tensor


def _within_chunks(block: _Block, dy_krqp: Tensor, D_h: Tensor | None) -> _InnerGrads:
    decay_krqq = block.decay()
    M_krqq = block.mixing(decay_krqq, D_h)
    dM_krqq = dy_krqp @ block.x_krqp.mT
    dD_kr = dM_krqq.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=decay_krqq.dtype)
    decayed = decay_krqq.mul_(dM_krqq)
    dCB_kqq = decayed.sum(1).to(dM_krqq.dtype)
    # d loss / d log M: what reaches s_i, and with the other sign s_j and log dt_j. Taken entry
    # by entry: the cheaper y.dy - x.dx differs by large diagonal terms that cancel badly.
    flow = decayed.mul_(block.CB_kqq.unsqueeze(1))
    out_krq, in_krq = flow.sum(-1), flow.sum(-2)
    return _InnerGrads(M_krqq.mT @ dy_krqp, dCB_kqq, out_krq - in_krq, in_krq, dD_kr)


class _OuterGrads(NamedTuple):
    """What flows through the states between chunks."""

    dx_krqp: Tensor
    """Before the decay from the token to the chunk's end."""
    dB_kqn: Tensor
    dC_kqn: Tensor
    ds_krq: Tensor
    dlog_dt_krq: Tensor


def _between_chunks(
    block: _Block, dy_krqp: Tensor, before_kne: Tensor, dstate_bgne: Tensor
) -> tuple[_OuterGrads, Tensor]:
    """Also returns the gradient of the state before the span."""
    dtype = dstate_bgne.dtype
    dy_kqe = block.by_token(dy_krqp, block.decay_in_krq)
    carried_kqe = torch.bmm(block.C_kqn, before_kne)
    ds_krq = block.by_head(dy_kqe * carried_kqe).sum(-1, dtype=dtype)
    dbefore = block.unfold(torch.bmm(block.C_kqn.mT, dy_kqe))
    dafter_kne = torch.empty_like(before_kne)
    dafter = block.unfold(dafter_kne)
    for i in reversed(range(block.span.num_chunks)):
        dafter[i] = dstate_bgne
        dstate_bgne = torch.addcmul(dbefore[i].to(dtype), dstate_bgne, block.total_mbg1e[i])
    dx_krqp = block.by_head(torch.bmm(block.B_kqn, dafter_kne))
    dlog_krq = (dx_krqp * block.x_krqp).sum(-1, dtype=dtype) * block.decay_out_krq
    ds_krq -= dlog_krq
    kept_ke = (dafter_kne * before_kne).sum(1, dtype=dtype)
    kept_kr = kept_ke.unflatten(1, (ds_krq.shape[1], -1)).sum(-1)
    ds_krq[..., -1] += dlog_krq.sum(-1) + kept_kr * block.decay_in_krq[..., -1]
    x_kqe = block.by_token(block.x_krqp, block.decay_out_krq)
    dB_kqn = torch.bmm(x_kqe, dafter_kne.mT)
    dC_kqn = torch.bmm(dy_kqe, before_kne.mT)
    return _OuterGrads(dx_krqp, dB_kqn, dC_kqn, ds_krq, dlog_krq), dstate_bgne


def _group_state(state_bhpn: Tensor, groups: int) -> Tensor:
    """-> [b, g, n, e]"""
    return state_bhpn.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)


def _head_state(state_bgne: Tensor, heads: int) -> Tensor:
    """-> [b, h, p, n]"""
    groups = state_bgne.shape[1]
    return state_bgne.unflatten(3, (heads // groups, -1)).permute(0, 1, 3, 4, 2).flatten(1, 2)
