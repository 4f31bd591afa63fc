"""Initial weights: Megatron's distributions, drawn from the seed and the name alone."""

import contextlib
import hashlib
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import model.initial
from model.hybrid import build_model, transformer_config
from model.initial import draw_weights
from recipes.compose import load_recipe
from tests.unit.world import fresh_world

EVERY_LAYER = "model.hybrid_layer_pattern=ME*-/*E/*E"


def weights(*overrides: str) -> dict[str, Tensor]:
    """Name -> parameter of a tiny model."""
    recipe = load_recipe(
        ["experiment=tiny", "precision=fp32", EVERY_LAYER, "model.ffn_hidden_size=96", *overrides]
    )
    with fresh_world(seed=recipe.run.seed):
        built = build_model(
            recipe, transformer_config(recipe.model, recipe.precision, recipe.parallel)
        )
        return {name: p.detach().clone() for name, p in built.named_parameters()}


def megatrons() -> dict[str, Tensor]:
    """The same, drawn by Megatron."""
    with (
        mock.patch.object(model.initial, "undrawn", lambda config: contextlib.nullcontext()),
        mock.patch.object(model.initial, "draw_weights", lambda *args: None),
    ):
        return weights()


@pytest.fixture(scope="module")
def ours() -> dict[str, Tensor]:
    return weights()


def distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov's distance of two samples, in units in which 1.95 is exceeded once in a
    thousand times by samples of one distribution."""
    a, b = a.flatten().double().sort().values, b.flatten().double().sort().values
    at = torch.cat([a, b])
    shares = [torch.searchsorted(x, at, right=True).double() / len(x) for x in (a, b)]
    size = len(a) * len(b) / (len(a) + len(b))
    return float((shares[0] - shares[1]).abs().max()) * math.sqrt(size)


def test_distributions_are_megatrons(ours: dict[str, Tensor]) -> None:
    theirs = megatrons()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.shape == theirs[name].shape and weight.dtype == theirs[name].dtype
        if bool((theirs[name] == theirs[name].flatten()[0]).all()):
            assert torch.equal(weight, theirs[name]), name  # ones
        else:
            # There are about 130 tensors here: 2.6 is exceeded once in 3000 suites.
            assert distance(weight, theirs[name]) < 2.6, name
            assert not torch.equal(weight, theirs[name])


def test_the_distance_sees_a_wrong_spread(ours: dict[str, Tensor]) -> None:
    weight = ours["output_layer.weight"]
    assert distance(weight, 1.03 * weight) > 2.6


def test_no_two_tensors_are_drawn_alike(ours: dict[str, Tensor]) -> None:
    """Experts, layers and parts of one matrix have generators of their own."""
    heads = [w.flatten()[:3].tolist() for w in ours.values() if w.flatten().std() > 0]
    assert len({tuple(h) for h in heads}) == len(heads)


def test_the_seed_decides(ours: dict[str, Tensor]) -> None:
    again, other = weights(), weights("run.seed=77")
    for name, weight in ours.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, other[name]) == bool((weight == 1).all())


def test_other_dtypes_are_rounded(ours: dict[str, Tensor]) -> None:
    for name, weight in weights("precision=bf16").items():
        assert torch.equal(weight, ours[name].to(weight.dtype)), name


def test_a_generator_is_the_twister_that_numpy_seeds() -> None:
    digest = hashlib.sha256(b"3 w[0] 1").digest()
    twister = np.random.MT19937(np.random.SeedSequence(int.from_bytes(digest[:16], "little")))
    twister.random_raw()  # a number of the state as it was seeded; PyTorch begins after it
    wanted = [int(word) % 2**31 for word in twister.random_raw(2000)]
    drawn = torch.empty(2000, dtype=torch.int32)
    assert drawn.random_(generator=model.initial._generator("3 w[0] 1")).tolist() == wanted


def test_blocks_share_no_stream_of_32_bits() -> None:
    """PyTorch's own seeding keeps 32 bits, and of 200,000 keys some have the same ones."""
    seen: dict[int, str] = {}
    for key in (f"3 w[0] {block}" for block in range(200_000)):
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
        if (other := seen.setdefault(seed % 2**32, key)) != key:
            break
    assert other != key
    low = seed % 2**32
    short, long = (torch.Generator().manual_seed(s) for s in (low, low + 2**32))
    assert torch.equal(torch.rand(9, generator=short), torch.rand(9, generator=long))
    one, two = (torch.rand(9, generator=model.initial._generator(k)) for k in (key, other))
    assert not (one == two).any()


@pytest.mark.parametrize("block", [1, 24, 100, 1000, 1 << 22])
def test_a_shard_is_a_part_of_the_whole(block: int) -> None:
    """Whatever the blocks, and wherever a rank's part begins and ends."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    def drawn(offset: tuple[int, ...], shape: tuple[int, ...], expert: int = 0) -> Tensor:
        data = torch.empty(shape)
        whole = (4, 30, 12)
        shard = ShardedTensor(
            "w", data, data.dtype, shape, whole, (expert, *offset), None, prepend_axis_num=1
        )
        model.initial._fill(shard, torch.nn.init.normal_, seed=3)
        return data

    with mock.patch.object(model.initial, "BLOCK", block):
        whole = drawn((0, 0), (30, 12))
        for rows in (slice(0, 10), slice(10, 20), slice(29, 30), slice(7, 23)):
            for columns in (slice(0, 12), slice(6, 12), slice(3, 4)):
                part = whole[rows, columns]
                assert torch.equal(drawn((rows.start, columns.start), tuple(part.shape)), part)
        assert not torch.equal(drawn((0, 0), (30, 12), expert=1), whole)


def test_a_tensor_without_a_distribution_is_refused() -> None:
    """A parameter Megatron adds one day is not left as it was allocated."""
    recipe = load_recipe(["experiment=tiny", "precision=fp32", "model.hybrid_layer_pattern=*"])
    with fresh_world():
        built = build_model(
            recipe, transformer_config(recipe.model, recipe.precision, recipe.parallel)
        )
        built.decoder.layers[0].self_attention.linear_qkv.extra = torch.nn.Parameter(torch.ones(3))
        with pytest.raises(AssertionError, match=r"extra|no shard"):
            draw_weights(built, 1, 4)
