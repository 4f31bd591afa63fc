"""A checkpoint as a model that can be run, on one rank: for validation and generation."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from model.conversion.table import pairs
from model.conversion.torch_dist import TorchDistReader, find_checkpoint, saved_recipe
from recipes.compose import load_recipe
from recipes.errors import CheckpointError
from recipes.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    Recipe,
)
from recipes.stages import Place, spans


@dataclass(frozen=True)
class Loaded:
    """What a job gets."""

    recipe: Recipe
    """Of the run, on one rank, without quantisation."""
    model: Any
    """Megatron's HybridModel in evaluation mode, in the dtype of the run's parameters, or of the
    weights of an imported checkpoint."""


def run_recipe(checkpoint: Path) -> Recipe:
    """The recipe of the run a checkpoint belongs to, for one rank and unquantised.

    Of an imported checkpoint, which knows its model alone, it has no data, and the dtype is that of
    the weights.

    Raises:
        CheckpointError: there is none, or it is of another version.
    """
    folder = find_checkpoint(checkpoint)
    saved = saved_recipe(folder)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(load_recipe(["experiment=tiny"])), saved)
        recipe = OmegaConf.to_object(merged)
    except Exception as error:
        text = str(error).splitlines()[0]
        raise CheckpointError(f"the recipe of {checkpoint} cannot be read: {text}") from error
    assert isinstance(recipe, Recipe)
    if recipe.stages:
        recipe = _stage_of(recipe, folder)
    if "data" not in saved:
        recipe.data = DataConfig(name="none")
        recipe.precision.params_dtype = _dtype_of(folder, recipe.model)
        longest = recipe.model.max_position_embeddings
        recipe.stage.sequence_length = min(recipe.stage.sequence_length, longest)
    recipe.parallel = ParallelConfig()
    recipe.checkpoint = CheckpointConfig()
    dtype = recipe.precision.params_dtype
    recipe.precision = PrecisionConfig(name="checkpoint", params_dtype=dtype)
    return recipe


def require_data(checkpoint: Path, key: str, remedy: str) -> None:
    """Refuse a checkpoint of no run where a run's data is to be read.

    Raises:
        CheckpointError: with the remedy.
    """
    if "data" not in saved_recipe(find_checkpoint(checkpoint)):
        raise CheckpointError(
            f"{checkpoint} was imported and names no data ({key}), as runs do; {remedy}"
        )


def _dtype_of(folder: Path, model: ModelConfig) -> str:
    """precision.params_dtype that holds all weights of a checkpoint exactly."""
    reader = TorchDistReader(folder)
    # Vectors that are always FP32 say nothing; a weight that is missing is told by its loading.
    names = {s.name for pair in pairs(model) if not pair.row.fp32 for s in pair.native}
    kinds = {str(reader.dtype(name)) for name in names & reader.shapes.keys()}
    return "bf16" if kinds == {"torch.bfloat16"} else "fp32"


def _stage_of(recipe: Recipe, checkpoint: Path) -> Recipe:
    """The recipe of the stage a checkpoint was saved in; a merged one has the last."""
    found = spans(recipe)
    meta = checkpoint / "meta.json"
    step = json.loads(meta.read_text())["progress"]["step"] if meta.exists() else found[-1].end
    return Place(found).of_last_step(step).span.recipe


def build(recipe: Recipe) -> Any:
    """The model of a recipe, in evaluation mode, on the device."""
    import torch
    from megatron.core.transformer.module import Float16Module

    from model.hybrid import build_model, transformer_config

    config = transformer_config(recipe.model, recipe.precision, recipe.parallel)
    model = build_model(recipe, config).to(torch.cuda.current_device())
    return (Float16Module(config, model) if config.bf16 else model).eval()


def with_model(checkpoint: Path, job: Callable[[Loaded], int]) -> int:
    """Load a checkpoint on one rank and do a job with it.

    Args:
        checkpoint: of a run, or a run's newest.
        job: returns an exit code.
    """
    from train.run import in_world
    from train.weights import load_model

    def run(recipe: Recipe, *rest: Any) -> int:
        model = build(recipe)
        load_model(checkpoint, [model])
        return job(Loaded(recipe, model))

    return in_world(run_recipe(checkpoint), run)
