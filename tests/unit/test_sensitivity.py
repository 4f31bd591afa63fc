"""Choosing what to protect, and the recipe that says so."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from model.gemms import policy_of
from precision.policy import Decision, Gemm
from precision.rules import read_rules
from precision.sensitivity import (
    Effect,
    candidates,
    protecting,
    published,
    ranked,
    recipe_of,
    within_budget,
    within_flops,
)
from recipes.compose import load_recipe
from recipes.schema import PrecisionRule

RULE = read_rules("precision.rules", [PrecisionRule(format="nvfp4")], 100)[0]


def effect(layer: int, flops: float, loss: float) -> Effect:
    gemm = Gemm(f"decoder.layers.{layer}.x", layer, "x", 16, 16, 256, flops / 3)
    return Effect(Decision(gemm, RULE, "nvfp4"), loss)


EFFECTS = [
    effect(0, 4, 0.8),
    effect(1, 1, 0.3),
    effect(2, 2, -0.1),
    effect(3, 5, 0.2),
    effect(4, 1, 0.25),
]


def layers(effects: list[Effect]) -> list[int | None]:
    return [e.decision.gemm.layer for e in effects]


def test_order_is_loss_saved_per_flop() -> None:
    assert layers(ranked(EFFECTS)) == [1, 4, 0, 3, 2]


def test_flops_are_filled_in_order() -> None:
    order = ranked(EFFECTS)
    assert layers(within_flops(order, 6)) == [1, 4, 0]
    # What does not fit is passed over, not the end of it.
    assert layers(within_flops(order, 4)) == [1, 4, 2]
    assert within_flops(order, 0) == []


@pytest.mark.parametrize("budget", [1.6, 1.3, 1.0, 0.25, 0.1, 0.0])
def test_shortest_beginning_within_a_budget(budget: float) -> None:
    order = ranked(EFFECTS)
    asked: list[int] = []

    def gap(kept: Sequence[Effect]) -> float:
        asked.append(len(kept))
        return sum(max(e.loss, 0) for e in order if e not in kept)

    found = within_budget(order, gap, budget)
    fits = [n for n in range(len(order) + 1) if gap(order[:n]) <= budget + 1e-12]
    assert len(found) == fits[0]
    assert len(set(asked)) <= 6


def test_greedy_is_near_the_best_of_all_subsets() -> None:
    order = ranked(EFFECTS)
    for budget in (1.3, 1.0, 0.5, 0.2):

        def left(kept: Sequence[Effect]) -> float:
            return sum(e.loss for e in order if e.loss > 0 and e not in kept)

        cost = sum(e.flops for e in within_budget(order, left, budget))
        subsets = [c for n in range(6) for c in combinations(order, n) if left(c) <= budget]
        best = min(sum(e.flops for e in c) for c in subsets)
        # A greedy beginning is at most one module above the best.
        assert best <= cost <= best + max(e.flops for e in order)


@pytest.mark.parametrize(("layers_", "first"), [(88, 74), (108, 92), (52, 44), (9, 7), (20, 17)])
def test_published_rule(layers_: int, first: int) -> None:
    effects = [effect(i, 1, 0.1) for i in range(layers_)]
    assert layers(published(effects, layers_)) == list(range(first, layers_))


def test_recipe_protects_just_the_chosen(tmp_path: Path) -> None:
    overrides = ["experiment=super_120b_a12b", "precision=nvfp4"]
    base = load_recipe([*overrides, "precision.protected_layers=last 0"])
    policy = policy_of(base)
    found = candidates(policy)
    assert all(d.gemm.layer is not None and d.format != "bf16" for d in found)
    chosen = [d for i, d in enumerate(found) if i % 7 in (0, 1, 3)]
    text = recipe_of(base.precision, [Effect(d, 0.1) for d in chosen], "measured", "a test")
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision" / "measured.yaml").write_text(text)
    again = policy_of(load_recipe([overrides[0], "precision=measured"], tmp_path))
    wanted = protecting(policy, [d.gemm.name for d in chosen])
    assert [(d.gemm, d.format) for d in again.start] == [(d.gemm, d.format) for d in wanted]
    assert sum(d.format != w.format for d, w in zip(policy.start, wanted, strict=True)) == len(
        chosen
    )
