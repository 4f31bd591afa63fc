"""Parts of unequal length are gathered and scattered over gloo as NCCL would."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed

ROWS = (3, 0, 5)


def check(rank: int, ranks: int) -> None:
    # Within a group in which ranks have other numbers than in the world.
    group: Any = dist.new_group([2, 1, 0], sort_ranks=False)
    place = dist.get_rank(group)
    whole = torch.arange(sum(ROWS) * 2, dtype=torch.float32).view(-1, 2)
    own = whole.split(ROWS)[place]
    for rows in (ROWS, (2, 2, 2)):
        gathered = torch.full((sum(rows), 2), -1.0)
        source = torch.full((rows[place], 2), float(place)) if rows is not ROWS else own
        dist.all_gather(list(gathered.split(rows)), source, group=group)
        wanted = whole if rows is ROWS else torch.arange(3.0).repeat_interleave(2)[:, None]
        assert torch.equal(gathered, wanted.expand_as(gathered))
    parts = list((whole * (place + 1)).split(ROWS))
    kept = [part.clone() for part in parts]
    total = torch.empty_like(own)
    dist.reduce_scatter(total, parts, group=group)
    assert torch.equal(total, own * 6)
    assert all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True))
    with pytest.raises(NotImplementedError, match="all_gather"):
        dist.all_gather(list(torch.empty(8, 2).split(ROWS)), own, group=group, async_op=True)


def test_parts_of_any_length() -> None:
    run_distributed(check, 3)
