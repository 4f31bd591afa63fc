"""How layouts are compared: the arithmetic around the trainings."""

from typing import Any

import pytest

from parallel.parity import (
    EXIT_FAILED,
    FIRST,
    LAST,
    MATRIX,
    QUANTISED_FIRST,
    REFERENCE,
    Bounds,
    Outcome,
    bounds,
    cut,
    exit_code,
    judge,
    markdown,
    report,
)
from recipes.compose import load_recipe
from recipes.errors import ConfigError


def steps(**changes: Any) -> list[dict[str, Any]]:
    """Two steps as metrics.jsonl has them, the last one changed."""
    step = {"loss": 4.0, "grad_norm": 2.0, "mtp_loss": [5.0, 6.0]}
    return [step, step | changes]


def test_stages_are_cut_without_touching_mtp() -> None:
    assert cut("ME*E/*E/*E", 1) == "ME*E/*E/*E"
    assert cut("ME*E/*E/*E", 4) == "M|E|*|E/*E/*E"
    assert cut("MEM*E", 2) == "ME|M*E"


def test_the_matrix_has_what_a_cluster_would_use() -> None:
    names = {"dp2", "tp2", "pp2", "pp2 vp2", "cp2", "ep2", "tp2 ep2", "ep2 cp2", "tp2 cp2"}
    assert names | {"pp2 ep2", "etp2"} <= {case.name for case in MATRIX}
    assert all(2 <= case.ranks <= 4 for case in MATRIX if case.name in names)
    recipe = load_recipe(["experiment=parity"])
    for case in MATRIX:
        load_recipe(["experiment=parity", *case.arguments(recipe.model.hybrid_layer_pattern)])


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "equal"),
        ({"loss": 4.0 * (1 + 0.9 * LAST)}, "equal"),
        ({"loss": 4.0 * (1 + 1.1 * LAST)}, "different"),
        ({"grad_norm": 2.0 * (1 - 1.1 * LAST)}, "different"),
        ({"mtp_loss": [5.0, 6.0 * (1 + 1.1 * LAST)]}, "different"),
        ({"loss": None}, "different"),  # not finite
    ],
)
def test_verdicts(changes: dict[str, Any], verdict: str) -> None:
    assert judge(MATRIX[1], steps(**changes), steps(), Bounds()).verdict == verdict
    first = list(reversed(steps(**changes)))
    if changes:
        assert LAST > FIRST
        assert judge(MATRIX[1], first, steps(), Bounds()).verdict == "different"


def test_a_short_run_has_failed() -> None:
    outcome = judge(REFERENCE, steps()[:1], steps(), Bounds())
    assert (outcome.verdict, outcome.reason) == ("failed", "1 steps, not 2")


def test_the_table_says_why_a_layout_is_missing() -> None:
    outcomes = [
        judge(MATRIX[1], steps(), steps(), Bounds()),
        Outcome("cp2", 2, "not available", "ConfigError: no"),
    ]
    text = report(outcomes)
    assert "cp2: ConfigError: no" in text and "not available" in text
    assert len(text.splitlines()) == 4
    assert exit_code(outcomes) == 0
    assert exit_code(outcomes[1:]) == EXIT_FAILED  # nothing was shown to be equal
    page = markdown(outcomes).splitlines()
    assert page[0].startswith("| layout | ranks | grad_norm, first |")
    assert page[1].count("|") == page[0].count("|") == page[2].count("|")


@pytest.mark.parametrize(
    ("precision", "name", "losses", "grad_norm"),
    [
        ("fp32", "tp2", FIRST, FIRST),
        ("bf16", "dp2", FIRST, FIRST),
        ("bf16", "tp2", QUANTISED_FIRST, QUANTISED_FIRST),
        ("nvfp4_rtn", "pp2", FIRST, FIRST),
        ("nvfp4", "pp2", FIRST, QUANTISED_FIRST),
        ("nvfp4", "ep2", QUANTISED_FIRST, QUANTISED_FIRST),
    ],
)
def test_bounds_know_scales_and_draws(
    precision: str, name: str, losses: float, grad_norm: float
) -> None:
    (case,) = (case for case in MATRIX if case.name == name)
    allowed = bounds(case, load_recipe([f"precision={precision}"]).precision)
    assert (allowed.losses, allowed.grad_norm) == (losses, grad_norm)


def test_commands_that_train_refuse_stages() -> None:
    from parallel import parity, payload

    recipe = load_recipe(["experiment=tiny_long_context"])
    for command in (parity, payload):
        with pytest.raises(ConfigError, match="without stages"):
            command.main(recipe)


def test_a_payload_of_a_recipe_that_counts_tokens_is_short() -> None:
    from parallel.payload import STEPS, shortened

    counted = ["experiment=nano_30b_a3b"]
    stage = load_recipe([*counted, *shortened(set())]).stage
    assert (stage.train_steps, stage.train_tokens) == (STEPS, None)
    given = "stage.train_tokens=1e9"
    stage = load_recipe([*counted, given, *shortened({"stage.train_tokens"})]).stage
    assert (stage.train_steps, stage.train_tokens) == (None, 1e9)
