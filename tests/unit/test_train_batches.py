"""What a run reads: the shares of its blend, and only as much as it asked for."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.compose import load_recipe
from recipes.errors import ConfigError
from recipes.schema import BlendEntry, Recipe
from tests.fixtures.corpus import make_texts, prepared
from tests.unit.world import fresh_world

WEIGHTS = {"train": 5.0, "other": 2.0, "third": 1.0}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with fresh_world():
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Twenty steps of eight samples from three sources."""
    folder = tmp_path_factory.mktemp("pairs")
    texts = {name: make_texts(60, seed) for seed, name in enumerate(WEIGHTS)}
    recipe = load_recipe(["experiment=tiny", "stage.sequence_length=32", "stage.train_steps=20"])
    recipe.data = prepared(folder, **texts)
    recipe.data.train = [BlendEntry(str(folder / name), w) for name, w in WEIGHTS.items()]
    return recipe


def test_a_run_reads_its_blend_in_the_shares_of_the_weights(recipe: Recipe) -> None:
    from train.batches import Batches

    batches = Batches(recipe, dp=1)
    steps = [batches.documents(step) for step in range(1, 21)]
    read = Counter(Path(str(path)).name for samples in steps for path, _ in samples)
    assert read == {"train": 100, "other": 40, "third": 20}
    # In every step, not only in the end: 5 : 2 : 1 of eight samples, one more or less.
    for samples in steps:
        part = Counter(Path(str(path)).name for path, _ in samples)
        assert all(abs(part[name] - weight) <= 1 for name, weight in WEIGHTS.items())


def test_a_checkpoint_of_a_longer_run_is_named(recipe: Recipe) -> None:
    from train.batches import Batches

    batches = Batches(recipe, dp=1)
    assert batches.fingerprint(20) != batches.fingerprint(10)
    with pytest.raises(ConfigError, match="train_steps=20 is less than the 50 steps the checkpoin"):
        batches.fingerprint(50)
