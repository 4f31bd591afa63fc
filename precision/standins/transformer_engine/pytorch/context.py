"""A sequence split between context-parallel ranks in the zig-zag (load balanced) layout.

The sequence is cut into 2 cp chunks; rank r holds chunks r and 2 cp - 1 - r, so that every rank
has as much causal attention to compute. Megatron's `get_batch_on_this_cp_rank` cuts batches so.

Three ways for a rank's queries to meet the keys of others, as in the real library:
`p2p` keys and values go round the ring of ranks; `all_gather` every rank gathers them all;
`a2a` every rank gets the whole sequence for its share of the heads.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .block_attention import Chunk, zeros_accumulated
from .comm import Group

COMM_TYPES = ("p2p", "all_gather", "a2a")
"""Those of the real library's that are implemented."""


def zigzag(rank: int, ranks: int, length: int) -> list[Chunk]:
    """The two chunks of a rank that holds `length` tokens of each `ranks * length`."""
    if length % 2:
        raise ValueError(f"{length} tokens of a rank are odd; the zig-zag layout has two chunks")
    n = length // 2
    return [Chunk(i * n, c * n, (c + 1) * n) for i, c in enumerate((rank, 2 * ranks - 1 - rank))]


class RingKeys:
    """Keys and values pass from rank to rank; their gradients travel with them, one hop on."""

    def __init__(self, group: Group, length: int) -> None:
        self._group, self._length = group, length

    def visit(self, kv: Tensor) -> Iterator[tuple[Sequence[Chunk], Tensor]]:
        """This rank's, then the previous rank's, and so on."""
        for hop in range(self._group.size()):
            kv = kv if hop == 0 else _from_previous(kv, self._group)
            yield self._chunks(hop), kv

    def visit_back(self, kv: Tensor) -> Iterator[tuple[Sequence[Chunk], Tensor, Tensor]]:
        """In the same order; the last hop brings this rank's gradient home."""
        dkv = zeros_accumulated(kv)
        for hop in range(self._group.size()):
            if hop:
                kv, dkv = _from_previous(kv, self._group), _from_previous(dkv, self._group)
            yield self._chunks(hop), kv, dkv
        self.gradient = _from_previous(dkv, self._group)

    def _chunks(self, hop: int) -> list[Chunk]:
        ranks = self._group.size()
        return zigzag((self._group.rank() - hop) % ranks, ranks, self._length)


class GatheredKeys:
    """Every rank has the keys and values of all; their gradients are reduced to the owners."""

    def __init__(self, group: Group, length: int) -> None:
        self._group, self._length = group, length

    def visit(self, kv: Tensor) -> Iterator[tuple[Sequence[Chunk], Tensor]]:
        """This rank's, then the next one's, and so on."""
        gathered = self._gather(kv)
        for rank in self._ranks():
            yield zigzag(rank, self._group.size(), self._length), gathered[rank]

    def visit_back(self, kv: Tensor) -> Iterator[tuple[Sequence[Chunk], Tensor, Tensor]]:
        """In the same order, gathered again."""
        gathered = self._gather(kv)
        dkv = zeros_accumulated(gathered)
        for rank in self._ranks():
            yield zigzag(rank, self._group.size(), self._length), gathered[rank], dkv[rank]
        self.gradient = torch.empty_like(dkv[0])
        dist.reduce_scatter_tensor(self.gradient, dkv.flatten(0, 1), group=self._group)

    def _gather(self, kv: Tensor) -> Tensor:
        gathered = kv.new_empty(self._group.size(), *kv.shape)
        dist.all_gather_into_tensor(gathered.flatten(0, 1), kv.contiguous(), group=self._group)
        return gathered

    def _ranks(self) -> list[int]:
        ranks = self._group.size()
        return [(self._group.rank() + i) % ranks for i in range(ranks)]


def gather_heads(x: Tensor, group: Group) -> Tensor:
    """[s, b, h, d] of every rank's tokens -> [cp s, b, h / cp, d], tokens in order."""
    return _ToHeads.apply(x, group)


def scatter_heads(x: Tensor, group: Group) -> Tensor:
    """The inverse of `gather_heads`."""
    return _ToTokens.apply(x, group)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(grad, ctx.group), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _to_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad, ctx.group), None


def _to_heads(x: Tensor, group: Group) -> Tensor:
    ranks = group.size()
    sent = x.unflatten(2, (ranks, -1)).movedim(2, 0).contiguous()  # [cp, s, b, h / cp, d]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    # From rank r came chunks r and 2 cp - 1 - r.
    first, second = received.unflatten(1, (2, -1)).unbind(1)
    return torch.cat([first, second.flip(0)]).flatten(0, 1)


def _to_tokens(x: Tensor, group: Group) -> Tensor:
    chunks = x.unflatten(0, (2 * group.size(), -1))
    first, second = chunks.chunk(2)
    sent = torch.stack([first, second.flip(0)], 1).flatten(1, 2).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, 2).flatten(2, 3)


def _from_previous(x: Tensor, group: Group) -> Tensor:
    """Send x to the next rank of the ring, receive the previous rank's."""
    rank, ranks = group.rank(), group.size()
    received = torch.empty_like(x)
    peers = [dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1)]
    hops = [
        dist.P2POp(dist.isend, x.contiguous(), peers[0], group),
        dist.P2POp(dist.irecv, received, peers[1], group),
    ]
    for work in dist.batch_isend_irecv(hops):
        work.wait()
    return received
