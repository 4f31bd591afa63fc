"""One model under many layouts, and its global tensors put together from the ranks' shards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from model.validate import validate_recipe
from parallel.groups import initialize_groups
from parallel.parity import Case
from recipes.compose import load_recipe
from recipes.schema import Recipe

PATTERN = "ME*E/*E/*E"
"""Layers of SMALL."""

SMALL = (
    "experiment=tiny",
    "precision=fp32",
    f"model.hybrid_layer_pattern={PATTERN}",
    "model.hidden_size=64",
    "model.vocab_size=512",
    "model.num_moe_experts=8",
    "stage.sequence_length=64",
    "stage.global_batch_size=4",
    "stage.micro_batch_size=1",
    "stage.eval_steps=1",
)
"""Every architectural part."""


@contextmanager
def laid_out(case: Case, world_size: int, *overrides: str) -> Iterator[tuple[Recipe, Any]]:
    """Megatron's groups of one layout up inside; torch.distributed stays for the next."""
    from megatron.core import parallel_state

    recipe = load_recipe([*SMALL, *case.arguments(PATTERN), *overrides])
    layout = validate_recipe(recipe, world_size)
    initialize_groups(recipe.parallel, recipe.run.seed, layout.virtual_stages)
    try:
        yield recipe, layout
    finally:
        parallel_state.destroy_model_parallel()


def shards(model: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Any]]:
    """(name, global shape, offset, values) of what a rank holds of the whole model."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    with torch.no_grad():
        state = dict(model.sharded_state_dict())
        apply_factories(state)
        return [
            (s.key, tuple(s.global_shape), tuple(s.global_offset), s.data.detach().clone())
            for s in nested_values(state)
            if isinstance(s, ShardedTensor) and s.data is not None
        ]


def whole(ranks: list[list[tuple[str, tuple[int, ...], tuple[int, ...], Any]]]) -> dict[str, Any]:
    """Name -> global tensor; what several ranks hold must be equal bit for bit."""
    import torch

    tensors: dict[str, Any] = {}
    for name, shape, offset, values in (shard for rank in ranks for shard in rank):
        tensor = tensors.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype))
        sizes = [1] * (len(shape) - values.dim()) + list(values.shape)
        where = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
        known = tensor[where]
        assert bool((known.isnan() | (known == values)).all()), f"ranks disagree about {name}"
        tensor[where] = values.reshape(sizes)
    for name, tensor in tensors.items():
        assert not bool(tensor.isnan().any()), f"no rank holds all of {name}"
    return tensors
