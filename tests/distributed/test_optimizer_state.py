"""A single rank saves its optimizer as the method of Megatron that it replaces does."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from parallel.parity import REFERENCE
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import laid_out
from tests.distributed.test_layouts import trainer


def _tensors(state: Any) -> dict[str, Any]:
    """Name and offset -> what is saved of the optimizer, factories applied."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    return {
        f"{s.key} {s.global_offset} {s.global_shape} {s.replica_id} {s.dtype}": s.data
        for s in nested_values(state)
        if isinstance(s, ShardedTensor) and s.key.startswith("optimizer.")
    }


def _both(rank: int, world_size: int, precision: str, folder: Path) -> tuple[int, int]:
    """Number of equal tensors, and of those whose memory is the optimizer's own."""
    import torch

    from train import state as saved

    (folder / "checkpoints").mkdir(parents=True)
    with laid_out(REFERENCE, world_size, f"precision={precision}") as (recipe, layout):
        state = trainer(recipe, layout, folder)
        state._step()
        ours = _tensors(saved.state_dict(state.state, loading=False))
        with mock.patch.object(saved, "whole_tensors_in_place", contextlib.nullcontext):
            theirs = _tensors(saved.state_dict(state.state, loading=False))
        live = {
            tensor.untyped_storage().data_ptr()
            for one in state.state.optimizer.chained_optimizers
            for group in one.optimizer.param_groups
            for param in group["params"]
            for tensor in (param, *one.optimizer.state[param].values())
            if isinstance(tensor, torch.Tensor)
        }
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
        return len(ours), sum(t.untyped_storage().data_ptr() in live for t in ours.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_saves_the_same_without_a_copy(precision: str, tmp_path: Path) -> None:
    ((equal, in_place),) = run_distributed(_both, 1, precision, tmp_path / "run")
    assert equal > 100 and in_place == equal
