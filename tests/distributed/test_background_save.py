"""What a save in the background writes is the state at its moment, however long the copy takes."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from parallel.parity import REFERENCE, Case
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import laid_out
from tests.distributed.test_layouts import trainer

SLOW = 2.0
"""Seconds before the state is read: several steps."""


def saved_while_training(rank: int, world_size: int, case: Case, run: Path, how: str) -> None:
    """Two saves, each with a step after it, then what each loads as against what it should; the
    second one comes to its end although training does not.

    Args:
        how: whether another process may read the state, or is sent it, or is forked for each save.
    """
    from train import checkpoint, saver

    read = saver.read_memory

    def late(*arguments: Any) -> None:
        time.sleep(SLOW)
        if how == "sent":
            raise PermissionError(1, "not permitted")
        read(*arguments)

    with laid_out(case, world_size) as (recipe, layout):
        with (
            mock.patch.object(saver, "read_memory", late),  # in the process that is forked here
            mock.patch.object(checkpoint, "can_act", lambda: how != "forked"),
        ):
            running = trainer(recipe, layout, run, async_save=True)
        state, states = running.state, {}
        for _ in range(2):
            running._step()
            states[state.progress.step] = everything(state)
            running.checkpointer.save(state)
            running._step()
        running.checkpointer.wait() if how == "forked" else running.checkpointer.leave()
        # Weights, moments and all else came through; and none is what came a step later.
        for step, was in states.items():
            if rank == 0:
                (run / "checkpoints" / "latest").write_text(f"iter_{step:07d}\n")
            dist.barrier()
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


ONE, TWO = REFERENCE, Case("dp2", data=2)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (ONE, "read"),
        (ONE, "sent"),
        (TWO, "read"),
        pytest.param(TWO, "sent", marks=pytest.mark.slow),
        (TWO, "forked"),
    ],
)
def test_the_state_at_its_moment(case: Case, how: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    run_distributed(saved_while_training, case.ranks, case, tmp_path, how)
