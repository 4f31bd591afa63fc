"""A checkpoint is the same to the converter in whatever layout it was saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.conversion.common import write_model
from model.conversion.from_hf import from_hf
from model.conversion.to_hf import to_hf
from parallel.parity import Case
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import laid_out
from tests.distributed.test_layouts import trainer
from tests.unit.conversion import (
    build,
    model_of,
    options,
    save,
    scramble,
    tensors,
    tensors_equal,
)
from tests.unit.world import fresh_world

FIELDS: dict[str, Any] = {"hybrid_layer_pattern": "ME|*-E/*E/*E"}
LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "expert": {"expert_model_parallel_size": 2},
    "expert tensor": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
}


def resave(rank: int, world_size: int, native: str, target: str, sizes: dict[str, Any]) -> None:
    """Load a checkpoint of one rank in another layout and save it there."""
    from megatron.core import parallel_state

    from parallel.groups import initialize_groups
    from recipes.schema import ParallelConfig
    from tests.unit.conversion import load

    parallel = replace(ParallelConfig(), **sizes)
    initialize_groups(parallel, seed=rank + 1)
    model = model_of(FIELDS)
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    network = build(model, parallel, pre_process=first, post_process=last)
    load(network, Path(native))
    save(network, Path(target), model)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    model = model_of(FIELDS)
    with fresh_world():
        network = build(model)
        scramble(network, seed=3)
        save(network, folder / "native", model)
    to_hf(options(folder / "native", folder / "hf"))
    # What is loaded in the layouts came from Hugging Face's folder.
    from_hf(options(folder / "hf", folder / "imported", shard_gigabytes=1e-4), print)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_folder(native: Path, tmp_path: Path, layout: str):
    target = tmp_path / "native"
    run_distributed(resave, 2, str(native / "imported"), str(target), LAYOUTS[layout])
    to_hf(options(target, tmp_path / "hf"))
    name = "model.safetensors"
    assert (tmp_path / "hf" / name).read_bytes() == (native / "hf" / name).read_bytes()
    assert len(tensors(tmp_path / "hf")) > 50


def train_and_save(rank: int, world_size: int, run: Path, weights: Path) -> None:
    """A checkpoint of training, optimizer state and all, and its weights alone."""
    from megatron.core.utils import unwrap_model

    with laid_out(Case("ep2", data=2, expert_model=2), world_size) as (recipe, layout):
        running = trainer(recipe, layout, run)
        running._step()
        running.checkpointer.save(running.state)
        running.checkpointer.close()
        save(unwrap_model(running.state.chunks[0]), weights, recipe.model)
        if rank == 0:
            write_model(recipe.model, run)


def test_a_checkpoint_of_training_goes_out(tmp_path: Path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run_distributed(train_and_save, 2, tmp_path / "run", tmp_path / "weights")
    for name in ("run", "weights"):
        to_hf(options(tmp_path / name, tmp_path / f"{name}_hf"))
    assert tensors_equal(tmp_path / "run_hf", tmp_path / "weights_hf")
