"""Which consecutive tokens of a sequence each context-parallel rank holds."""

from bisect import bisect_right
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """A sequence cut into segments, and whose they are.

    Every rank holds equally many, laid end to end in its tensors.
    """

    group: dist.ProcessGroup
    ends: tuple[int, ...]
    """Where each segment ends; it begins where the one before it ends."""
    owners: tuple[tuple[int, ...], ...]
    """The numbers of each rank's segments, in the order of its tensors."""

    @property
    def own(self) -> tuple[int, ...]:
        """The numbers of this rank's segments."""
        return self.owners[self.group.rank()]

    @property
    def lengths(self) -> list[int]:
        """Tokens in each of this rank's segments."""
        return [end - start for start, end in map(self.span, self.own)]

    def span(self, segment: int) -> tuple[int, int]:
        """First token of a segment, and the one after its last."""
        return (self.ends[segment - 1] if segment else 0), self.ends[segment]

    def gather(self, own: Tensor) -> Tensor:
        """[k, ...] of each rank's k segments -> [segment, ...], in the order of the sequence."""
        size = len(self.owners)
        gathered = own.new_empty(size * own.shape[0], *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own.contiguous(), group=self.group)
        order = [segment for rank in self.owners for segment in rank]
        return gathered[torch.tensor(order, device=own.device).argsort()]

    def rows(self, tokens: list[int]) -> list[int]:
        """Where this rank's tensors have those of `tokens` that it holds."""
        starts = {segment: sum(self.lengths[:i]) for i, segment in enumerate(self.own)}
        found = ((bisect_right(self.ends, token), token) for token in tokens)
        return [starts[s] + token - self.span(s)[0] for s, token in found if s in starts]


def zigzag_segments(group: dist.ProcessGroup, length: int) -> Segments:
    """Megatron's layout: 2 cp equal segments, numbers r and 2 cp - 1 - r on rank r.

    Args:
        group: the context-parallel ranks.
        length: tokens of the whole sequence.
    """
    size = group.size()
    assert length % (2 * size) == 0, "validated: sequence_length % (2 * cp) == 0"
    step = length // (2 * size)
    return Segments(
        group,
        tuple(range(step, length + 1, step)),
        tuple((rank, 2 * size - 1 - rank) for rank in range(size)),
    )
