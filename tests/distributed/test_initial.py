"""One seed gives the same weights on any layout and number of ranks."""

from typing import Any

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.layouts import Sizes, laid_out, shards, whole

TWO = [
    Sizes("data"),
    Sizes("tensor", tp=2),
    Sizes("experts over tensor ranks", tp=2, ep=2),
    Sizes("expert tensor", tp=2, etp=2),
    Sizes("pipeline", pp=2),
    Sizes("virtual stages", pp=2, virtual=2),
    Sizes("expert", ep=2),
    Sizes("context", cp=2),
]
FOUR = [
    Sizes("tensor and expert", tp=2, ep=2),
    Sizes("pipeline and tensor", pp=2, tp=2),
    Sizes("pipeline and expert", pp=2, ep=2),
]


def build(rank: int, world_size: int, layouts: list[Sizes]) -> list[Any]:
    from model.hybrid import transformer_config
    from train.build import _build_chunks

    found = []
    for sizes in layouts:
        with laid_out(sizes, world_size) as (recipe, _):
            config = transformer_config(recipe.model, recipe.precision, recipe.parallel)
            chunks = _build_chunks(recipe, config)
            found.append([shard for chunk in chunks for shard in shards(chunk)])
    return found


@pytest.mark.parametrize(("world_size", "layouts"), [(2, TWO), (4, FOUR)])
def test_weights_do_not_depend_on_the_layout(world_size: int, layouts: list[Sizes]) -> None:
    one = whole([run_distributed(build, 1, [Sizes("one")])[0][0]])
    ranks = run_distributed(build, world_size, layouts)
    for i, sizes in enumerate(layouts):
        tensors = whole([rank[i] for rank in ranks])
        assert tensors.keys() == one.keys(), sizes.name
        for name, tensor in tensors.items():
            assert tensor.equal(one[name]), f"{sizes.name}: {name}"
