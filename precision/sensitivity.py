"""`python -m precision.sensitivity experiment=tiny precision=nvfp4 run.dir=runs/mine`: what each
quantised module costs, and the policy that protects the fewest FLOPs for a loss budget.

The plain part: ranking modules, choosing what to protect, writing a recipe. Losses are measured
by train/sensitivity.py; sensitivity.md says what they mean.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from precision.policy import Decision, Policy, is_quantized
from recipes.compose import run_cli
from recipes.schema import PrecisionConfig, Recipe

PUBLISHED_SHARE = 0.15
"""Share of the layers, counted from the end, that the published recipe protects, rounded up."""

PUBLISHED_LAYERS = {108: 16}
"""Layers of a model -> those it protects where that is published and another number: Ultra's."""

PRODUCTS = 3
"""Products of a training step with a weight: forward and two gradients, alike in FLOPs."""


@dataclass(frozen=True)
class Effect:
    """What quantising one module does to the held-out loss."""

    decision: Decision
    loss: float
    """Nats a token that it costs; negative: it helped."""

    @property
    def name(self) -> str:
        """Global name of the module."""
        return self.decision.gemm.name

    @property
    def flops(self) -> float:
        """Training FLOPs a token of the module."""
        return PRODUCTS * self.decision.gemm.flops


def main(recipe: Recipe) -> int:
    """Measure, choose, write the policy and the report."""
    # Inside, because nothing else in this package may know the trainer: this command does.
    from train.sensitivity import run

    return run(recipe)


def candidates(policy: Policy) -> tuple[Decision, ...]:
    """The modules to measure: those of the decoder that the policy quantises at the start.
    Multi-token prediction does not touch the loss of the next token."""
    return tuple(d for d in policy.start if is_quantized(d.format) and d.gemm.layer is not None)


def ranked(effects: Iterable[Effect]) -> list[Effect]:
    """Most loss saved by a protected FLOP first: the order of the greedy knapsack."""
    return sorted(effects, key=lambda e: e.loss / e.flops, reverse=True)


def published(effects: Iterable[Effect], num_layers: int) -> list[Effect]:
    """Those that the last-15 % rule protects."""
    share = math.ceil(round(PUBLISHED_SHARE * num_layers, 9))
    first = num_layers - PUBLISHED_LAYERS.get(num_layers, share)
    return [e for e in effects if (e.decision.gemm.layer or 0) >= first]


def within_flops(order: Sequence[Effect], flops: float) -> list[Effect]:
    """Of an order, what fits into so many FLOPs, first come first served."""
    chosen, left = [], flops * (1 + 1e-9)
    for effect in order:
        if effect.flops <= left:
            chosen.append(effect)
            left -= effect.flops
    return chosen


def within_budget(
    order: Sequence[Effect], loss_gap: Callable[[Sequence[Effect]], float], budget: float
) -> list[Effect]:
    """The shortest beginning of an order that keeps the loss within the budget when protected.

    Found by bisection, so with about log2(n) measurements: it takes the gap to fall as more is
    protected. Protecting everything must be within the budget.

    Args:
        loss_gap: protected modules -> relative loss of the quantised model, measured.
    """
    low, high = -1, len(order)  # order[:high] is within the budget, order[:low] is not
    while high - low > 1:
        middle = (low + high) // 2
        if loss_gap(order[:middle]) <= budget:
            high = middle
        else:
            low = middle
    return list(order[:high])


def protecting(policy: Policy, names: Iterable[str]) -> tuple[Decision, ...]:
    """The policy's formats at the start, with the named modules not quantised."""
    protected = set(names)
    return tuple(replace(d, format="bf16") if d.gemm.name in protected else d for d in policy.start)


def recipe_of(base: PrecisionConfig, protected: Sequence[Effect], name: str, why: str) -> str:
    """The YAML of a precision recipe: `base` with the modules protected by extra rules.

    One rule for each kind of module; layers that follow each other are written as a range.
    """
    from omegaconf import OmegaConf

    layers: dict[str, list[int]] = defaultdict(list)
    for effect in protected:
        gemm = effect.decision.gemm
        assert gemm.layer is not None, "candidates are of the decoder"
        layers[gemm.module].append(gemm.layer)
    rules = [
        {"layers": _ranges(sorted(numbers)), "module": module, "format": "bf16", "why": why}
        for module, numbers in sorted(layers.items())
    ]
    recipe = asdict(base)
    # What they take may leave a rule of the base with nothing to decide.
    recipe["rules"] = [rule | {"optional": True} for rule in recipe["rules"]]
    recipe |= {"name": name, "extra_rules": rules + recipe["extra_rules"]}
    return OmegaConf.to_yaml(OmegaConf.create(recipe))


def _ranges(numbers: Sequence[int]) -> list[int | str]:
    """[1, 2, 3, 7] -> ["1-3", 7]."""
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    parts = [numbers[a:b] for a, b in pairwise([0, *cuts, len(numbers)])]
    return [p[0] if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]


if __name__ == "__main__":
    run_cli(main, "precision.sensitivity")
