"""Whatever happens to a run, its updates have read each document's text once, in one order.

A run is a chain of starts, each with its own layout, micro batch and precision, cut off somewhere
and gone on with from its last checkpoint. What counts is what the surviving updates read.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import BatchSource, Dataset, build_datasets, document_ids
from recipes.compose import load_recipe
from recipes.schema import Recipe
from tests.fixtures.corpus import make_texts, prepared
from tests.unit.world import fresh_world

BATCH = 8
STEPS = 12
LENGTH = 32

type Read = list[tuple[str, tuple[int, ...], tuple[int, ...]]]
"""Of each sample: data prefix, numbers of its documents, tokens."""


@dataclass(frozen=True)
class Start:
    """One start of a run. Add a field for whatever else a start may change."""

    ranks: int
    micro: int
    precision: str
    steps: int
    """Steps done before it is cut off."""
    saved: int
    """Of these, steps that the last checkpoint holds."""


starts = st.builds(
    Start,
    ranks=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2]),
    precision=st.sampled_from(["bf16", "nvfp4", "mxfp8"]),
    steps=st.integers(0, 5),
    saved=st.integers(0, 5),
)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """The same run in each precision."""
    folder = tmp_path_factory.mktemp("pairs")
    size = (f"stage.sequence_length={LENGTH}", f"stage.train_steps={STEPS}")
    data = prepared(folder, train=make_texts(60), other=make_texts(60, seed=1))
    found = {}
    for precision in ("bf16", "nvfp4", "mxfp8"):
        found[precision] = load_recipe(
            ["experiment=tiny", f"precision={precision}", f"stage.global_batch_size={BATCH}", *size]
        )
        found[precision].data = deepcopy(data)
    return found


@pytest.fixture(scope="module")
def datasets(recipes: dict[str, Recipe]) -> Iterator[dict[str, Dataset]]:
    """What each start builds anew."""
    with fresh_world():
        yield {
            name: build_datasets(r.data, LENGTH, r.run.seed, STEPS * BATCH, 0)[0]
            for name, r in recipes.items()
        }


def read(dataset: Dataset, start: Start, consumed: int, steps: int) -> Read:
    """What all ranks together read in some steps, as samples in the order of the run."""
    sources = [
        BatchSource(dataset, BATCH, start.micro, rank, start.ranks, consumed)
        for rank in range(start.ranks)
    ]
    found: Read = []
    for step in range(steps):
        rows = [
            tuple(row.tolist())
            for source in sources
            for _ in range(source.num_microbatches)
            for row in next(source)["tokens"]
        ]
        first = consumed + step * BATCH
        documents = document_ids(dataset, range(first, first + BATCH))
        found += [
            (Path(prefix).name, tuple(ids), row)
            for (prefix, ids), row in zip(documents, rows, strict=True)
        ]
    return found


@settings(max_examples=40, deadline=None)
@given(chain=st.lists(starts, max_size=5))
def test_no_chain_of_starts_repeats_or_skips(
    chain: list[Start], datasets: dict[str, Dataset]
) -> None:
    whole = Start(ranks=1, micro=1, precision="bf16", steps=STEPS, saved=STEPS)
    consumed, survived = 0, []
    for start in [*chain, whole]:
        left = STEPS - consumed // BATCH
        steps = min(start.steps, left)
        saved = min(start.saved, steps)
        survived += read(datasets[start.precision], start, consumed, steps)[: saved * BATCH]
        consumed += saved * BATCH
    assert consumed == STEPS * BATCH
    assert survived == read(datasets["bf16"], whole, 0, STEPS)


@pytest.mark.parametrize("precision", ["nvfp4", "mxfp8"])
def test_the_checkpoint_of_one_precision_knows_the_data_of_another(
    precision: str, recipes: dict[str, Recipe], datasets: dict[str, Dataset]
) -> None:
    from train.batches import Batches

    one, other = Batches(recipes["bf16"], dp=1), Batches(recipes[precision], dp=2)
    for step in range(STEPS + 1):
        assert one.fingerprint(step) == other.fingerprint(step)
        if step:
            assert one.documents(step) == other.documents(step)
