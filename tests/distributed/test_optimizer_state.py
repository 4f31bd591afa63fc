"""Ranks save their shares of the optimizer as the method of Megatron that gathers them does."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.parity import REFERENCE, Case
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import laid_out
from tests.distributed.test_layouts import trainer
from train.optimizer_shares import boxes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_hold_the_range_in_its_order(shape: list[int], data: st.DataObject) -> None:
    elements = np.arange(np.prod(shape)).reshape(shape)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, elements.size)] * 2)))
    found = [
        elements[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]
        for box in boxes(tuple(shape), start, end)
    ]
    assert [int(i) for part in found for i in part.flat] == list(range(start, end))
    assert len(found) < 2 * len(shape)


def _saved(state: Any, both: Callable[[Any], contextlib.AbstractContextManager[Any]]) -> list[Any]:
    """The optimizer's sharded tensors, factories applied."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from train import state as saved

    with mock.patch.object(saved, "shares_in_place", both):
        content = saved.state_dict(state, loading=False)
    apply_factories(content)
    return [
        s
        for s in nested_values(content)
        if isinstance(s, ShardedTensor) and s.key.startswith("optimizer.")
    ]


def _both(rank: int, world_size: int, case: Case, precision: str, folder: Path) -> tuple[int, ...]:
    """Bytes of the pieces of this rank that are written, and of all, and of those whose memory is
    the optimizer's own."""
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from train.optimizer_shares import shares_in_place

    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with laid_out(case, world_size, f"precision={precision}") as (recipe, layout):
        state = trainer(recipe, layout, folder)
        state._step()
        ours = _saved(state.state, shares_in_place)
        theirs = _saved(state.state, lambda _: contextlib.nullcontext())
        live = {
            tensor.untyped_storage().data_ptr()
            for one in state.state.optimizer.chained_optimizers
            for group in one.optimizer.param_groups
            for param in group["params"]
            for tensor in (param, *one.optimizer.state[param].values())
            if isinstance(tensor, torch.Tensor)
        }
        mine = [s for s in ours if is_main_replica(s.replica_id)]
        pieces: list[Any] = [[] for _ in range(world_size)]
        dist.all_gather_object(pieces, [(s.key, s.global_offset, s.data, s.dtype) for s in mine])
        wanted = {s.key: s for s in theirs}
        found = {
            key: torch.full(s.global_shape, torch.nan, dtype=s.dtype) for key, s in wanted.items()
        }
        for key, offset, data, dtype in sum(pieces, []):
            if key in found:  # not of another pipeline stage
                assert dtype == found[key].dtype
                shape = (1,) * (len(offset) - data.dim()) + tuple(data.shape)
                place = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
                assert bool(found[key][place].isnan().all()), f"{key} is written twice"
                found[key][place] = data.view(shape)
        for s in theirs:
            assert torch.equal(found[s.key][s.global_slice()], s.data), s.key
        in_place = [s for s in ours if s.data.untyped_storage().data_ptr() in live]
        return tuple(sum(s.data.nbytes for s in some) for some in (mine, ours, in_place))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_saves_the_same_without_a_copy(precision: str, tmp_path: Path) -> None:
    ((written, every, in_place),) = run_distributed(
        _both, 1, REFERENCE, precision, tmp_path / "run"
    )
    assert written == every == in_place > 1e6


RUN_LESS = (Case("cp2", context=2), Case("dp4", data=4))
SHARED = (
    Case("dp2", data=2),
    Case("dp4 ep2", data=4, expert_model=2),
    Case("tp2 dp2", tensor_model=2, data=2),
    Case("pp2 dp2", pipeline_model=2, data=2),
)


@pytest.mark.parametrize(
    "case",
    [*SHARED, *(pytest.param(case, marks=pytest.mark.slow) for case in RUN_LESS)],
    ids=lambda case: case.name,
)
def test_ranks_save_their_shares(case: Case, tmp_path: Path) -> None:
    sizes = run_distributed(_both, case.ranks, case, "bf16", tmp_path / "run")
    written, every, in_place = zip(*sizes, strict=True)
    assert every == in_place
    # Everybody has something to do: shares are as large as buckets divided by ranks.
    assert max(written) < 1.3 * sum(written) / len(written)
