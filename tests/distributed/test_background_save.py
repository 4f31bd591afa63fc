"""What a save in the background writes is the state at its moment, however long the copy takes."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.parity import REFERENCE
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import laid_out
from tests.distributed.test_layouts import trainer

SLOW = 2.0
"""Seconds before the state is read: several steps."""


def saved_while_training(rank: int, world_size: int, run: Path, readable: bool) -> None:
    """Two saves, each with a step after it, then what each loads as against what it should; the
    second one comes to its end although training does not."""
    from train import saver

    read = saver.read_memory

    def late(*arguments: Any) -> None:
        time.sleep(SLOW)
        if not readable:
            raise PermissionError(1, "not permitted")
        read(*arguments)

    with laid_out(REFERENCE, world_size) as (recipe, layout):
        with mock.patch.object(saver, "read_memory", late):  # in the process that is forked here
            running = trainer(recipe, layout, run, async_save=True)
        state, states = running.state, {}
        for _ in range(2):
            running._step()
            states[state.progress.step] = everything(state)
            running.checkpointer.save(state)
            running._step()
        running.checkpointer.leave()
        # Weights, moments and all else came through; and none is what came a step later.
        for step, was in states.items():
            (run / "checkpoints" / "latest").write_text(f"iter_{step:07d}\n")
            assert running.checkpointer.load(state)
            now = everything(state)
            assert now.keys() == was.keys() and len(now) > 100
            for name, tensor in now.items():
                assert torch.equal(tensor, was[name]), (step, name)
        first, second = states.values()
        differing = [name for name in first if not torch.equal(first[name], second[name])]
        assert len(differing) > 0.9 * sum(f.numel() > 1 for f in first.values())


def everything(state: Any) -> dict[str, torch.Tensor]:
    """Copies of all tensors that a checkpoint holds, by name."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from train.state import state_dict

    content = state_dict(state, loading=False)
    apply_factories(content)
    return {
        f"{entry.key} {entry.global_offset}": entry.data.detach().clone()
        for entry in nested_values(content)
        if isinstance(entry, ShardedTensor)
    }


@pytest.mark.parametrize("readable", [True, False])
def test_the_state_at_its_moment(readable: bool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    run_distributed(saved_while_training, 1, tmp_path, readable)
