"""One seed gives the same weights on any layout and number of ranks."""

from typing import Any

import pytest

from parallel.parity import MATRIX, REFERENCE, Case
from tests.distributed.harness import run_distributed
from tests.distributed.layouts import laid_out, shards, whole

TWO = [
    *(case for case in MATRIX if case.ranks == 2),
    Case("tp2, experts over its ranks", tensor_model=2, expert_model=2),
]
FOUR = [
    Case("tp2 ep2", tensor_model=2, data=2, expert_model=2),
    Case("pp2 tp2", pipeline_model=2, tensor_model=2),
    Case("pp2 ep2", pipeline_model=2, data=2, expert_model=2),
]


def build(rank: int, world_size: int, layouts: list[Case]) -> list[Any]:
    from model.hybrid import transformer_config
    from train.build import _build_chunks

    found = []
    for case in layouts:
        with laid_out(case, world_size) as (recipe, _):
            config = transformer_config(recipe.model, recipe.precision, recipe.parallel)
            chunks = _build_chunks(recipe, config)
            found.append([shard for chunk in chunks for shard in shards(chunk)])
    return found


@pytest.mark.parametrize(("world_size", "layouts"), [(2, TWO), (4, FOUR)])
def test_weights_do_not_depend_on_the_layout(world_size: int, layouts: list[Case]) -> None:
    one = whole([run_distributed(build, 1, [REFERENCE])[0][0]])
    ranks = run_distributed(build, world_size, layouts)
    for i, case in enumerate(layouts):
        tensors = whole([rank[i] for rank in ranks])
        assert tensors.keys() == one.keys(), case.name
        for name, tensor in tensors.items():
            assert tensor.equal(one[name]), f"{case.name}: {name}"
