"""Stages of a recipe: what each of them is, where it begins, which length and law a step has."""

import math
from collections import Counter
from itertools import groupby, pairwise

import pytest

from model.validate import validate_recipe, validate_stages
from recipes.compose import load_recipe, to_yaml
from recipes.errors import ConfigError
from recipes.schema import LengthConfig, Recipe, StageConfig
from recipes.stages import (
    learning_law,
    pattern,
    place_at,
    saved_recipe,
    spans,
    stage_recipes,
    tokens_after_steps,
    train_steps,
)

THREE = (
    "experiment=tiny",
    "stages.one.stage={train_steps: 3}",
    "stages.two={stage.train_steps: 4}",
    "stages.three.stage={train_steps: null, train_tokens: 5000, sequence_length: 64}",
)


def three(*overrides: str) -> Recipe:
    return load_recipe([*THREE, *overrides])


def test_a_stage_is_the_recipe_with_its_changes() -> None:
    chosen = ("stages.two.optimizer=nano", "stages.two.optimizer.lr=0.5")
    recipe = three("optimizer.weight_decay=0.3", *chosen)
    one, two, last = stage_recipes(recipe)
    plain = load_recipe(["experiment=tiny", "optimizer.weight_decay=0.3", "stage.train_steps=3"])
    plain.stage.name = "one"
    assert one == plain
    # The recipe a stage chooses comes before its own keys, and those of the command line.
    assert (two.optimizer.lr, two.optimizer.min_lr) == (0.5, 1e-5)
    assert two.optimizer.weight_decay == 0.3
    assert (last.stage.train_steps, last.stage.sequence_length) == (None, 64)
    assert all(not r.stages for r in (one, two, last))


def test_a_written_recipe_is_the_same_one() -> None:
    import yaml

    recipe = three("stages.two.stage.mix=[{share: 0.5, sequence_length: 8, global_batch_size: 2}]")
    again = saved_recipe(yaml.safe_load(to_yaml(recipe)))
    assert again == recipe and stage_recipes(again) == stage_recipes(recipe)


def test_null_takes_a_stage_out_and_run_stage_chooses_one() -> None:
    assert list(three("stages.two=null").stages) == ["one", "three"]
    alone = three("run.stage=two")
    assert not alone.stages and alone.stage.train_steps == 4
    validate_recipe(alone)


def test_where_the_stages_begin() -> None:
    one, two, last = spans(three())
    assert [s.first_step for s in (one, two, last)] == [0, 3, 7]
    assert [s.first_tokens for s in (one, two, last)] == [0, 3 * 2048, 7 * 2048]
    assert last.steps == 10 and last.end == 17  # 5000 tokens in steps of 8 x 64
    places = [place_at([one, two, last], step).index for step in range(20)]
    assert places == [0] * 3 + [1] * 4 + [2] * 13
    assert place_at([one, two, last], 7).of_last_step(7).index == 1


def test_a_recipe_without_stages_is_one_stage() -> None:
    recipe = load_recipe(["experiment=tiny"])
    (span,) = spans(recipe)
    assert span.recipe is recipe and (span.first_step, span.end) == (0, 300)
    assert recipe.optimizer.lr_schedule_tokens is None


def test_stages_with_one_law_share_it() -> None:
    recipe = load_recipe(
        [
            "experiment=tiny",
            "stages.one.stage={train_steps: 3}",
            "stages.two.stage={train_steps: 4}",
            "stages.three.optimizer={lr_decay_style: constant, lr_warmup_fraction: 0}",
            "stages.four={}",
        ]
    )
    found = spans(recipe)
    assert [s.law_tokens for s in found] == [0, 0, 7 * 2048, 307 * 2048]
    schedules = [s.recipe.optimizer.lr_schedule_tokens for s in found]
    assert schedules == [7 * 2048, 7 * 2048, 300 * 2048, 300 * 2048]
    assert learning_law(found[0].recipe.optimizer) == learning_law(found[1].recipe.optimizer)


def mixed(*shares: float) -> StageConfig:
    lengths = [LengthConfig(share, 16, 64, 1) for share in shares]
    return StageConfig(sequence_length=1024, global_batch_size=2, mix=lengths)


@pytest.mark.parametrize("shares", [(0.5,), (0.08,), (0.125, 0.25), (0.3, 0.3, 0.3)])
def test_lengths_keep_to_their_shares(shares: tuple[float, ...]) -> None:
    lengths = pattern(mixed(*shares))
    wanted = [1 - sum(shares), *shares]
    order = [lengths.at(step) for step in range(1000)]
    for steps in range(1, 1001):
        counts = Counter(order[:steps])
        assert [counts[i] for i in range(len(wanted))] == lengths.counts(steps)
        for i, share in enumerate(wanted):
            assert abs(counts[i] - share * steps) < len(wanted)
    for i, share in enumerate(wanted):
        assert lengths.counts(1000)[i] == pytest.approx(share * 1000)


def test_the_order_is_spread_out() -> None:
    assert [pattern(mixed(0.5)).at(i) for i in range(6)] == [0, 1, 0, 1, 0, 1]
    rare = [pattern(mixed(0.08)).at(i) for i in range(100)]
    runs = [len(list(steps)) for which, steps in groupby(rare) if which == 0]
    assert rare.count(1) == 8 and max(runs) <= 13
    assert all(b - a > 10 for a, b in pairwise([i for i, which in enumerate(rare) if which]))


@pytest.mark.parametrize("tokens", [1, 2048, 2049, 3072, 3073, 100_000, 99_999])
def test_steps_of_a_mix_are_the_fewest_with_its_tokens(tokens: int) -> None:
    stage = mixed(0.25)  # steps of 2048 and of 1024 tokens
    stage.train_tokens = float(tokens)
    steps = train_steps(stage)
    sizes = [1024 if pattern(stage).at(i) else 2048 for i in range(steps)]
    assert sum(sizes) >= tokens > sum(sizes[:-1])
    assert tokens_after_steps(stage) == [sum(sizes[: i + 1]) for i in range(steps)]


MIX = "stages.one.stage.mix=[{%s}]"
BAD: list[tuple[list[str], list[str]]] = [
    (["stages=3"], ["stages=3", "must be a mapping"]),
    (["stages.one=3"], ["stages.one=3 is no stage", "write what it changes"]),
    (["stages={a-b: {}}"], ["stages.a-b is no name", "letters, digits and _"]),
    (["stages.one.data=nope"], ["stages.one.data=nope", "use one of code"]),
    (["stages.one.stage.train_stepz=3"], ["stages.one.stage.train_stepz", "stage.train_steps?"]),
    (["stages.one.qqqq=3"], ["unknown key stages.one.qqqq"]),
    (["stages.one.model=small"], ["stages.one.model", "the same in every stage"]),
    (["stages.one.run.seed=3"], ["stages.one.run.seed", "the same in every stage"]),
    (["stages.one.checkpoint.load=x"], ["stages.one.checkpoint.load", "checkpoint.save_interval"]),
    (["stages.one.data.tokenizer.path=x"], ["data.tokenizer.path", "set data.tokenizer.path"]),
    (["stages.one.precision.params_dtype=fp32"], ["precision.params_dtype", "of the recipe"]),
    (["stages.one.stage.name=x"], ["stages.one.stage.name", "the same"]),
    (["stages.one.stage.train_steps=x"], ["stages.one: stage.train_steps", "it takes int"]),
    (["stages.two.data=nemotron"], ["stages.two: data.tokenizer.path", "of the first stage"]),
    (["stages.two.precision=fp32"], ["stages.two: precision.params_dtype=fp32", "bf16"]),
    (["stages.two.stage.train_tokens=9e9"], ["stages.two: stage.train_steps=4", "both fix"]),
    (["stages.two.stage.micro_batch_size=3"], ["stages.two: ", "micro_batch_size"]),
    (["stages.two.parallel.context_parallel_size=3"], ["stages.two: ", "context_parallel_size=3"]),
    (["stages.two.optimizer.lr_warmup_tokens=1e15"], ["stages.two: ", "longer than the schedule"]),
    (["run.stage=four"], ["run.stage=four", "use one of one, two, three"]),
    ([MIX % "share: 1.5, sequence_length: 8, global_batch_size: 8"], ["stage.mix[0].share=1.5"]),
    ([MIX % "share: 0, sequence_length: 8, global_batch_size: 8"], ["stage.mix[0].share=0"]),
    ([MIX % "share: 0.5, sequence_length: 8"], ["stages.one", "global_batch_size is set by no"]),
    ([MIX % "share: 0.1234567, sequence_length: 8, global_batch_size: 8"], ["repeats only after"]),
    ([MIX % "shar: 0.5, sequence_length: 8, global_batch_size: 8"], ["shar", "share?"]),
    (
        [MIX % "share: 0.5, sequence_length: 8, global_batch_size: 7, micro_batch_size: 2"],
        ["stages.one: stage.mix[0]: ", "global_batch_size=7"],
    ),
    (
        [MIX % "share: 0.5, sequence_length: 2097152, global_batch_size: 1"],
        ["stages.one: stage.mix[0]: ", "max_position_embeddings"],
    ),
    (
        [
            "stages.one.stage.mix=[{share: 0.6, sequence_length: 8, global_batch_size: 8}, "
            "{share: 0.4, sequence_length: 16, global_batch_size: 8}]"
        ],
        ["stages.one: stage.mix=[0.6, 0.4]", "leaves no steps"],
    ),
]


@pytest.mark.parametrize(("overrides", "said"), BAD, ids=lambda x: str(x)[:60])
def test_bad_stages_are_answered_with_one_sentence(overrides: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        validate_stages(three(*overrides))
    for words in said:
        assert words in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_run_stage_without_stages() -> None:
    with pytest.raises(ConfigError, match="run.stage=x is not a stage .*leave it out"):
        load_recipe(["experiment=tiny", "run.stage=x"])


def test_a_schedule_over_two_stages_is_minus_sqrt_over_both() -> None:
    """The law of Megatron's schedule, placed by the spans, against its definition."""
    from train.optimizer import schedule_tokens

    recipe = load_recipe(
        [
            "experiment=tiny",
            "optimizer.lr_warmup_fraction=0.1",
            "optimizer.lr_wsd_decay_fraction=0.5",
            "stages.one.stage.train_steps=6",
            "stages.two.stage.train_steps=4",
        ]
    )
    for span in spans(recipe):
        warmup, decay, whole = schedule_tokens(span.recipe.optimizer, span.recipe.stage)
        assert (warmup, decay, whole) == (2048, 5 * 2048, 10 * 2048)
        assert math.isclose(span.law_tokens, 0)


@pytest.mark.parametrize(
    ("experiment", "phases", "long", "rate", "layout", "batch"),
    [
        ("nano_30b_a3b", (23.5e12, 1.5e12), [121e9], 1e-5, (8, 8, 8, 4), 25_165_824),
        ("super_120b_a12b", (20e12, 5e12), [34e9, 17e9], 4.5e-6, (64, 2, 64, 1), 16_777_216),
        ("ultra_550b_a55b", (15e12, 5e12), [33e9], 2.5e-6, (32, 8, 128, 2), 25_165_824),
    ],
)
def test_published_stages(
    experiment: str,
    phases: tuple[float, float],
    long: list[float],
    rate: float,
    layout: tuple[int, int, int, int],
    batch: int,
) -> None:
    recipe = load_recipe([f"experiment={experiment}_stages"])
    found = validate_stages(recipe)
    tokens = [span.recipe.stage.train_tokens for span, _ in found]
    assert tokens == [*phases, *long]
    for span, ranks in found[2:]:
        optimizer = span.recipe.optimizer
        assert (optimizer.lr, optimizer.min_lr, optimizer.lr_decay_style) == (
            rate,
            rate,
            "constant",
        )
        assert (ranks.cp, ranks.tp, ranks.ep, ranks.pp) == layout
        assert ranks.cp * ranks.tp == recipe.model.mamba_num_heads
        lengths = pattern(span.recipe.stage)
        assert {shape.sequence_length * shape.global_batch_size for shape in lengths.shapes} == {
            batch
        }
        assert span.law_tokens == found[2][0].first_tokens
    # Both phases are one schedule, of their tokens rounded up to steps.
    assert [span.law_tokens for span, _ in found[:2]] == [0, 0]
    assert found[0][0].recipe.optimizer.lr_schedule_tokens == sum(phases)
    assert found[2][0].first_tokens == pytest.approx(sum(phases), rel=1e-5)


def test_published_numbers_of_steps() -> None:
    """2027 and 1014 of NVIDIA's recipes for Super; Ultra has 8 % of 4k steps."""
    found = spans(load_recipe(["experiment=super_120b_a12b_stages"]))
    assert [span.steps for span in found[2:]] == [2027, 1014]
    mixed_stage = spans(load_recipe(["experiment=ultra_550b_a55b_stages"]))[2].recipe.stage
    assert pattern(mixed_stage).counts(1300) == [1196, 104]
