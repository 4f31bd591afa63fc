"""What stages read: nothing twice and nothing left out where they read on, at equal lengths."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.compose import load_recipe
from recipes.errors import DataError
from recipes.schema import DataConfig, Recipe
from recipes.stages import place_at, spans, tokens_per_step
from tests.fixtures.corpus import make_texts, prepared
from tests.unit.world import fresh_world

NAMES = ("train", "other", "third")


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with fresh_world():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("pairs")
    return prepared(folder, **{name: make_texts(80, seed) for seed, name in enumerate(NAMES)})


def staged(data: DataConfig, *overrides: str) -> Recipe:
    """Stages of a few small steps on these pairs."""
    folder = Path(data.train[0].path).parent
    words = [o.replace("DIR", str(folder)) for o in overrides]
    sizes = ("stage.sequence_length=32", "stage.global_batch_size=4", "stage.micro_batch_size=4")
    path = data.tokenizer.path
    own = (
        f"data.tokenizer={{library: {data.tokenizer.library}, path: {path or 'null'}}}",
        "data.tokenizer.train_vocab_size=null",
        f"data.train=[{{path: {folder}/train}}]",
        "data.validation=[]",
    )
    return load_recipe(["experiment=tiny", *sizes, *own, *words])


def texts(recipe: Recipe) -> list[list[tuple[int, ...]]]:
    """The token rows of every step of a run, stage by stage as it would train."""
    from train.batches import Batches

    steps: list[list[tuple[int, ...]]] = []
    found = spans(recipe)
    for index, span in enumerate(found):
        batches = Batches(span.recipe, 1, place_at(found, span.first_step))
        assert place_at(found, span.first_step).index == index
        for step in range(span.first_step, span.end):
            # Asked for anew at every step, as after a kill.
            batch = next(batches.train_from(step))
            steps.append([tuple(int(t) for t in row) for row in batch["tokens"]])
    return steps


def test_two_stages_read_what_one_does(data: DataConfig) -> None:
    one = texts(staged(data, "stage.train_steps=11"))
    two = texts(staged(data, "stages.a.stage.train_steps=4", "stages.b.stage.train_steps=7"))
    assert two == one
    rows = [row for step in one for row in step]
    assert len(set(rows)) == len(rows) == 44


def test_other_weights_read_on_in_each_path(data: DataConfig) -> None:
    """A path's samples, over all stages, are those of a run that reads it alone, in order."""
    first = "data.train: [{path: DIR/train, weight: 3}, {path: DIR/other, weight: 1}]"
    second = "data.train: [{path: DIR/other, weight: 2}, {path: DIR/third, weight: 3}]"
    last = "data.train: [{path: DIR/train, weight: 1}, {path: DIR/third, weight: 1}]"
    recipe = staged(
        data,
        f"stages.a={{stage.train_steps: 5, {first}}}",
        f"stages.b={{stage.train_steps: 6, {second}}}",
        f"stages.c={{stage.train_steps: 4, {last}}}",
    )
    read = [row for step in texts(recipe) for row in step]
    assert len(set(read)) == len(read) == 60
    together = 0
    for name in NAMES:
        alone = texts(staged(data, "data.train=[{path: DIR/" + name + "}]", "stage.train_steps=12"))
        rows = [row for step in alone for row in step]
        mine = [row for row in read if row in set(rows)]
        assert mine == rows[: len(mine)] and len(mine) > 8
        together += len(mine)
    assert together == 60


def test_a_mix_reads_no_text_at_two_lengths(data: DataConfig) -> None:
    from train.batches import Batches

    mix = "[{share: 0.5, sequence_length: 16, global_batch_size: 8, micro_batch_size: 8}]"
    recipe = staged(data, f"stage.mix={mix}", "stage.train_steps=12")
    batches = Batches(recipe, 1)
    documents: list[set[object]] = [set(), set()]
    for step in range(1, 13):
        for _, numbers in batches.documents(step):
            documents[(step - 1) % 2] |= set(numbers)  # type: ignore[call-overload]
    assert documents[0] and documents[1] and not documents[0] & documents[1]
    shapes = [len(step[0]) for step in texts(recipe)]
    assert shapes == [32, 16] * 6
    for rows in (texts(recipe)[::2], texts(recipe)[1::2]):
        flat = [row for step in rows for row in step]
        assert len(set(flat)) == len(flat)


def test_the_stages_of_a_mix_read_on_too(data: DataConfig) -> None:
    mix = "[{share: 0.25, sequence_length: 16, global_batch_size: 8, micro_batch_size: 8}]"
    one = texts(staged(data, f"stage.mix={mix}", "stage.train_steps=12"))
    parts = [f"stages.{n}.stage={{train_steps: {k}, mix: {mix}}}" for n, k in (("a", 4), ("b", 8))]
    assert texts(staged(data, *parts)) == one


def test_fingerprints_are_those_of_the_stage_of_the_last_step(data: DataConfig) -> None:
    from train.batches import Batches

    recipe = staged(data, "stages.a.stage.train_steps=4", "stages.b.stage.train_steps=7")
    found = spans(recipe)
    before = Batches(found[0].recipe, 1, place_at(found, 0))
    after = Batches(found[1].recipe, 1, place_at(found, 4))
    assert before.fingerprint(4) == after.fingerprint(4)
    assert len({after.fingerprint(step) for step in range(4, 12)}) == 8
    assert [s.first_tokens for s in found] == [0, 4 * tokens_per_step(recipe.stage)]


def test_too_few_documents_to_divide(data: DataConfig, tmp_path: Path) -> None:
    from train.batches import Batches

    few = prepared(tmp_path, train=[" ".join(make_texts(60, 5))])
    mix = "[{share: 0.5, sequence_length: 16, global_batch_size: 8, micro_batch_size: 8}]"
    recipe = staged(few, f"stage.mix={mix}", "stage.train_steps=2")
    with pytest.raises(DataError, match=r"has 1 documents, too few .* a path of its own"):
        Batches(recipe, 1)
