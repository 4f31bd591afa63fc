"""The stages of a run and the lengths of a stage: which step is what. Plain arithmetic.

`stages` of a recipe says what each stage changes; a stage is the recipe with these changes, an
ordinary recipe. Everything else follows from the lengths of the stages: where each begins, in
steps, sequences and tokens, and where its law of the learning rate began.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from fractions import Fraction
from itertools import accumulate
from math import lcm
from typing import Any, cast

from omegaconf import OmegaConf

from recipes.errors import ConfigError
from recipes.schema import BlendEntry, LengthConfig, OptimizerConfig, Recipe, StageConfig

type Shape = StageConfig | LengthConfig
"""What decides the size of a step: sequence_length, global_batch_size, micro_batch_size."""

LONGEST_PATTERN = 1000
"""Steps after which the order of a stage's lengths must repeat."""


def tokens_per_step(shape: Shape) -> int:
    """Tokens of one optimizer step."""
    return shape.global_batch_size * shape.sequence_length


@dataclass(frozen=True)
class Pattern:
    """Which of its lengths each step of a stage has. The order repeats."""

    shapes: tuple[Shape, ...]
    """The stage's own length, then those of `stage.mix`."""
    order: tuple[int, ...]
    """Which of them a step has, for the steps until it repeats."""

    def at(self, step: int) -> int:
        """Which of the shapes a step of the stage has, counted from 0."""
        return self.order[step % len(self.order)]

    def counts(self, steps: int) -> list[int]:
        """How many of the stage's first steps have each shape."""
        rounds, rest = divmod(steps, len(self.order))
        return [
            rounds * self.order.count(i) + self.order[:rest].count(i)
            for i in range(len(self.shapes))
        ]

    def samples(self, steps: int) -> int:
        """Sequences of the stage's first steps."""
        counts = zip(self.counts(steps), self.shapes, strict=True)
        return sum(n * shape.global_batch_size for n, shape in counts)

    def tokens(self, steps: int) -> int:
        """Tokens of the stage's first steps."""
        counts = zip(self.counts(steps), self.shapes, strict=True)
        return sum(n * tokens_per_step(shape) for n, shape in counts)

    def steps_for(self, tokens: int) -> int:
        """The fewest steps with so many tokens."""
        steps = tokens // self.tokens(len(self.order)) * len(self.order)
        while self.tokens(steps) < tokens:
            steps += 1
        return steps


def pattern(stage: StageConfig) -> Pattern:
    """The order of a stage's lengths: at every step the one that is furthest behind its share,
    and of equals the first. Shares are exact: after a whole pattern nothing is behind."""
    shapes: tuple[Shape, ...] = (stage, *stage.mix)
    if not stage.mix:
        return Pattern(shapes, (0,))
    shares = mix_shares(stage)
    length = lcm(*(share.denominator for share in shares))
    counts = [0] * len(shares)
    order: list[int] = []
    for step in range(1, length + 1):
        behind = [share * step - n for share, n in zip(shares, counts, strict=True)]
        order.append(behind.index(max(behind)))
        counts[order[-1]] += 1
    return Pattern(shapes, tuple(order))


def mix_shares(stage: StageConfig) -> list[Fraction]:
    """Shares of the steps, the stage's own length first, as they are written: 0.08 is 2/25."""
    mixed = [Fraction(str(length.share)) for length in stage.mix]
    return [Fraction(1) - sum(mixed, Fraction(0)), *mixed]


def train_steps(stage: StageConfig) -> int:
    """Optimizer steps of the stage, from train_steps or rounded up from train_tokens."""
    if stage.train_steps is not None:
        return stage.train_steps
    assert stage.train_tokens is not None, "validated before"
    return pattern(stage).steps_for(int(stage.train_tokens))


def stage_length(stage: StageConfig) -> int:
    """Tokens of the whole stage."""
    return pattern(stage).tokens(train_steps(stage))


def tokens_after_steps(stage: StageConfig) -> list[int]:
    """Tokens of the stage after each of its steps."""
    lengths = pattern(stage)
    order = [tokens_per_step(lengths.shapes[lengths.at(i)]) for i in range(train_steps(stage))]
    return list(accumulate(order))


@dataclass(frozen=True)
class Span:
    """A stage in its run."""

    recipe: Recipe
    """Of the stage alone, `lr_schedule_tokens` filled in."""
    first_step: int = 0
    """Steps of the run before it."""
    first_samples: int = 0
    """Sequences of the run before it."""
    first_tokens: int = 0
    """Tokens of the run before it."""
    law_tokens: int = 0
    """Tokens of the run before its law of the learning rate began."""

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.recipe.stage.name

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return train_steps(self.recipe.stage)

    @property
    def end(self) -> int:
        """Steps of the run when it is done."""
        return self.first_step + self.steps


@dataclass(frozen=True)
class Place:
    """One stage of a run, among the others."""

    spans: list[Span]
    index: int = 0

    @property
    def span(self) -> Span:
        """The stage itself."""
        return self.spans[self.index]

    @property
    def following(self) -> "Place | None":
        """The next stage, if there is one."""
        return Place(self.spans, self.index + 1) if self.index + 1 < len(self.spans) else None

    @property
    def staged(self) -> bool:
        """Whether the run has more than this one stage."""
        return len(self.spans) > 1

    def of_last_step(self, steps: int) -> "Place":
        """The stage of the last of so many steps."""
        return place_at(self.spans, max(0, steps - 1))


def place_at(spans: list[Span], steps: int) -> Place:
    """Where a run is that has done so many steps; the last stage when all is done."""
    done = [i for i, span in enumerate(spans[:-1]) if span.end <= steps]
    return Place(spans, len(done))


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """One recipe a stage, in order; the recipe itself if it has no stages."""
    if not recipe.stages:
        return [recipe]
    return [_changed(recipe, name, changes) for name, changes in recipe.stages.items()]


def choose(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one stage, as a run of its own.

    Raises:
        ConfigError: there is no such stage.
    """
    if name not in recipe.stages:
        names = ", ".join(recipe.stages)
        remedy = f"use one of {names}" if names else "leave it out: this recipe has no stages"
        raise ConfigError(f"run.stage={name} is not a stage of this recipe; {remedy}")
    return _changed(recipe, name, recipe.stages[name])


def spans(recipe: Recipe) -> list[Span]:
    """The stages of a run in order, each where it begins. Validate the recipes first."""
    recipes = stage_recipes(recipe)
    if len(recipes) == 1 and not recipe.stages:
        return [Span(recipe)]
    found: list[Span] = []
    step = samples = tokens = law = 0
    for i, one in enumerate(recipes):
        if i and learning_law(one.optimizer) != learning_law(recipes[i - 1].optimizer):
            law = tokens
        found.append(Span(one, step, samples, tokens, law))
        steps, lengths = train_steps(one.stage), pattern(one.stage)
        step += steps
        samples += lengths.samples(steps)
        tokens += lengths.tokens(steps)
    ends = [span.first_tokens for span in found[1:]] + [tokens]
    for span in found:
        if span.recipe.optimizer.lr_schedule_tokens is None:  # the tokens of the law's stages
            end = max(
                e for s, e in zip(found, ends, strict=True) if s.law_tokens == span.law_tokens
            )
            span.recipe.optimizer.lr_schedule_tokens = float(end - span.law_tokens)
    return found


def learning_law(optimizer: OptimizerConfig) -> dict[str, Any]:
    """What decides the learning rate: stages with the same, one after the other, share one law."""
    names = [f.name for f in fields(optimizer) if f.name == "min_lr" or f.name.startswith("lr")]
    return {name: getattr(optimizer, name) for name in names}


def saved_recipe(config: dict[str, Any]) -> Recipe:
    """The recipe a run has written down; keys younger than the run have their defaults."""
    merged = OmegaConf.merge(OmegaConf.structured(Recipe), config)
    return cast(Recipe, OmegaConf.to_object(merged))


def saved_length(config: dict[str, Any]) -> tuple[int, int]:
    """Steps and tokens of a whole run by what it has written down."""
    if config.get("stages"):
        last = spans(saved_recipe(config))[-1]
        return last.end, last.first_tokens + stage_length(last.recipe.stage)
    merged = OmegaConf.merge(OmegaConf.structured(StageConfig), config["stage"])
    stage = cast(StageConfig, OmegaConf.to_object(merged))
    return train_steps(stage), stage_length(stage)


def _changed(recipe: Recipe, name: str, changes: dict[str, Any]) -> Recipe:
    """A recipe with the (dotted) keys of a stage changed and no stages."""
    one = deepcopy(recipe)
    one.stages, one.run.stage = {}, None
    config = with_keys(OmegaConf.structured(one), changes | {"stage.name": name})
    return cast(Recipe, OmegaConf.to_object(config))


def with_keys(config: Any, changes: dict[str, Any]) -> Any:
    """A configuration with dotted keys changed; lists are replaced as a whole."""
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        tree: dict[str, Any] = {leaf: value}
        for name in reversed(parents):
            tree = {name: tree}
        config = OmegaConf.merge(config, OmegaConf.create(tree))
    return config


@dataclass(frozen=True)
class Reading:
    """What the steps of one length of one stage read: so many samples of a blend."""

    blend: tuple[BlendEntry, ...]
    sequence_length: int
    samples: int
    documents: dict[str, tuple[Fraction, Fraction]] = field(default_factory=dict)
    """Part of a path's text that is for this length, where a stage reads it at several; a path
    that is not named: all of it."""


def readings(recipe: Recipe) -> list[Reading]:
    """What a stage reads, for each of its lengths.

    A path that several lengths of a stage read is divided between them, in proportion to the tokens
    of each, so that no text is read at two lengths.
    """
    lengths, steps = pattern(recipe.stage), train_steps(recipe.stage)
    counts = lengths.counts(steps)
    blends = [_blend(recipe, shape) for shape in lengths.shapes]
    whole = [
        n * tokens_per_step(shape)
        for n, shape in zip(lengths.counts(len(lengths.order)), lengths.shapes, strict=True)
    ]
    found = []
    for i, (shape, blend) in enumerate(zip(lengths.shapes, blends, strict=True)):
        parts: dict[str, tuple[Fraction, Fraction]] = {}
        for entry in blend:
            readers = [k for k, b in enumerate(blends) if any(e.path == entry.path for e in b)]
            if len(readers) > 1:
                total = sum(whole[k] for k in readers)
                before = sum(whole[k] for k in readers if k < i)
                parts[entry.path] = Fraction(before, total), Fraction(before + whole[i], total)
        samples = counts[i] * shape.global_batch_size
        found.append(Reading(tuple(blend), shape.sequence_length, samples, parts))
    return found


def _blend(recipe: Recipe, shape: Shape) -> Sequence[BlendEntry]:
    own = shape.train if isinstance(shape, LengthConfig) else []
    return own or recipe.data.train
