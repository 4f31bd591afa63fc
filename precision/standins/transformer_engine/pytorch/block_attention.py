"""Causal attention in blocks: packed documents, and sequences split between ranks.

A rank holds one or two *chunks* of the sequence. What a chunk has of one document is a *piece*:
its queries see the keys of the same document up to their own. Keys and values come chunk by
chunk, from this rank or from others (context.py); for each block of queries and keys PyTorch's
fused attention gives an output and the logarithm of its softmax sum, and those merge exactly:

    lse = log(exp lse_1 + exp lse_2),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The backward pass of a block needs nothing but the final `out` and `lse`. So memory is linear in
the length and no mask is ever built. It is computed in FP32 at least: PyTorch's sums the gradients
of keys and values over blocks of 256 queries in their own type, and in BF16 that is off by 1 % at
16,384 queries and by 13 % at 131,072.

Shape legend: s tokens of this rank, b batch, h query heads, g key/value heads, r = h / g,
d head dim, n = b g. Queries are [n, r, s, d], keys and values [n, 1, s, d].
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

EXACT_QUERIES = 2048
"""Up to so many the error of those sums is no larger than that of rounding them once."""
TILE = 8192
"""Queries and keys that are computed at a time: copies of them in FP32 stay small."""


class Chunk(NamedTuple):
    """Consecutive tokens that a rank holds."""

    row: int
    """Where they begin in the rank's tensors."""
    start: int
    """Where they begin in the sequence."""
    end: int
    """Where they end in the sequence."""


class Piece(NamedTuple):
    """What a chunk has of one document, in tokens of the sequence."""

    row: int
    start: int
    end: int
    document: int
    """Where the document begins."""


class Keys(Protocol):
    """Where keys and values come from: one rank's [2, n, s, d] at a time, this rank's first."""

    def visit(self, kv: Tensor) -> Iterator[tuple[Sequence[Chunk], Tensor]]:
        """The chunks and the keys and values of each rank in turn."""
        ...

    def visit_back(self, kv: Tensor) -> Iterator[tuple[Sequence[Chunk], Tensor, Tensor]]:
        """The same, with a tensor to add the gradient to. When the iteration has ended,
        `gradient` is that of this rank's keys and values."""
        ...

    @property
    def gradient(self) -> Tensor:
        """[2, n, s, d], accumulated, after `visit_back`."""
        ...


class OwnKeys:
    """The whole sequence is on this rank."""

    def __init__(self, length: int) -> None:
        self._chunks = [self.whole(length)]

    @staticmethod
    def whole(length: int) -> Chunk:
        """The sequence as one chunk."""
        return Chunk(0, 0, length)

    def visit(self, kv: Tensor) -> Iterator[tuple[Sequence[Chunk], Tensor]]:
        """One visit."""
        yield self._chunks, kv

    def visit_back(self, kv: Tensor) -> Iterator[tuple[Sequence[Chunk], Tensor, Tensor]]:
        """One visit."""
        self.gradient = zeros_accumulated(kv)
        yield self._chunks, kv, self.gradient


def pieces_of(chunks: Sequence[Chunk], documents: Sequence[int]) -> list[Piece]:
    """Cut chunks at document boundaries, [0, end of the first, ..., end of the last]."""
    return [
        Piece(chunk.row + start - chunk.start, start, end, first)
        for chunk in chunks
        for first, last in zip(documents, documents[1:], strict=False)
        if (start := max(first, chunk.start)) < (end := min(last, chunk.end))
    ]


def zeros_accumulated(x: Tensor) -> Tensor:
    """Zeros of x's shape that sums are kept in: FP32, or FP64 for FP64."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


class _Block(NamedTuple):
    """Rows of queries against rows of keys."""

    queries: slice
    keys: slice
    diagonal: bool
    """The same tokens on both sides: a query sees the keys up to its own. Else it sees all."""


def _blocks(pieces: Sequence[Piece], chunks: Sequence[Chunk]) -> Iterator[_Block]:
    for piece in pieces:
        queries = slice(piece.row, piece.row + piece.end - piece.start)
        for chunk in chunks:
            offset = chunk.row - chunk.start
            if chunk.start <= piece.start < chunk.end:
                same = slice(piece.start + offset, piece.end + offset)
                yield from _tiles(_Block(queries, same, True))
            first, last = max(piece.document, chunk.start), min(piece.start, chunk.end)
            if first < last:
                yield from _tiles(_Block(queries, slice(first + offset, last + offset), False))


def _tiles(block: _Block) -> Iterator[_Block]:
    for row in range(block.queries.start, block.queries.stop, TILE):
        queries = slice(row, min(row + TILE, block.queries.stop))
        to_diagonal = block.keys.start + queries.stop - block.queries.start
        stop = to_diagonal if block.diagonal else block.keys.stop
        for key in range(block.keys.start, stop, TILE):
            keys = slice(key, min(key + TILE, stop))
            yield _Block(queries, keys, block.diagonal and keys.stop == stop)


class BlockAttention(torch.autograd.Function):
    """(q [n, r, s, d], kv [2, n, s, d], pieces, keys, scale) -> out [n, r, s, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, pieces: list[Piece], keys: Keys, scale: float
    ) -> Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = zeros_accumulated(q), zeros_accumulated(q[..., 0]).fill_(-torch.inf)
        for chunks, visiting in keys.visit(kv):
            for block in _blocks(pieces, chunks):
                k, v = (_expanded(t[:, block.keys], q) for t in visiting)
                added, lse_added = attend(
                    q[:, :, block.queries], k, v, 0.0, block.diagonal, scale=scale
                )
                _merge(out[:, :, block.queries], lse[:, :, block.queries], added, lse_added)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.pieces, ctx.keys, ctx.scale = pieces, keys, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, kv, out, lse = ctx.saved_tensors
        dq = zeros_accumulated(q)
        for chunks, visiting, dkv in ctx.keys.visit_back(kv):
            for block in _blocks(ctx.pieces, chunks):
                rows = block.queries
                k, v = (_expanded(t[:, block.keys].to(dq.dtype), q) for t in visiting)
                grads = attend_backward(
                    *(t[:, :, rows].to(dq.dtype) for t in (dout, q)),
                    k,
                    v,
                    *(t[:, :, rows].to(dq.dtype) for t in (out, lse)),
                    0.0,
                    block.diagonal,
                    scale=ctx.scale,
                )
                dq[:, :, rows] += grads[0]
                for i in (0, 1):
                    dkv[i][:, block.keys] += grads[i + 1].sum(1)
        return dq.to(q.dtype), ctx.keys.gradient.to(kv.dtype), None, None, None


def _expanded(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values for every head of a group, without a copy."""
    return x.unsqueeze(1).expand(-1, q.shape[1], -1, -1)


def _merge(out: Tensor, lse: Tensor, added: Tensor, lse_added: Tensor) -> None:
    """Add a block's attention to what other blocks gave, in place."""
    lse_added = lse_added.to(lse.dtype)
    total = torch.logaddexp(lse, lse_added)
    out.mul_((lse - total).exp_().unsqueeze(-1))
    out.addcmul_(added.to(out.dtype), (lse_added - total).exp_().unsqueeze(-1))
    lse.copy_(total)
