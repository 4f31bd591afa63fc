"""Decoding with states and caches says what whole forward passes say."""

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.errors import ConfigError
from tests.unit.conversion import build, logits, model_of, scramble, tokens_of
from tests.unit.world import fresh_world
from train.decoding import Limits, decode, greedy, sampler
from train.generate import generate
from train.speculative import speculate

NEW = 12


@pytest.fixture(scope="module", params=["MEM*E-/*E/*E", "M*E/*E/*E"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    fields = {
        "hybrid_layer_pattern": request.param,
        "mtp_use_repeated_layer": request.param.startswith("MEM"),
    }
    with fresh_world():
        network = build(model_of(fields))
        scramble(network, seed=1)
        yield network


def whole_passes(model: Any, prompts: torch.Tensor, count: int) -> list[list[int]]:
    text = prompts
    for _ in range(count):
        text = torch.cat([text, logits(model, text)[:, -1:].argmax(-1)], 1)
    return text[:, prompts.shape[1] :].tolist()


def prompts(length: int) -> torch.Tensor:
    return tokens_of(model_of({"hybrid_layer_pattern": "M"}))[:, :length]


@pytest.mark.parametrize("length", [1, 5, 21])
def test_greedy_is_that_of_whole_passes(model: Any, length: int):
    wanted = whole_passes(model, prompts(length), NEW)
    assert decode(model, prompts(length), greedy, Limits(NEW)) == wanted
    alone = decode(model, prompts(length)[1:], greedy, Limits(NEW))
    assert alone == wanted[1:]


def test_every_step_has_the_logits_of_the_whole_pass(model: Any):
    seen = []

    def watch(step: torch.Tensor) -> torch.Tensor:
        seen.append(step.clone())
        return greedy(step)

    new = decode(model, prompts(7), watch, Limits(NEW))
    text = torch.cat([prompts(7), torch.tensor(new)], 1)
    whole = logits(model, text)[:, 6:-1]
    found = torch.stack(seen[:NEW], 1)
    assert ((found - whole).norm() / whole.norm()).item() < 1e-5


@pytest.mark.parametrize("depths", [1, 2, 4])
def test_speculation_changes_nothing(model: Any, depths: int):
    for prompt in prompts(9):
        wanted = whole_passes(model, prompt[None], NEW)[0]
        done = speculate(model, prompt, depths, NEW)
        assert done.tokens == wanted
        assert done.passes <= NEW
        assert done.passes + sum(done.accepted) >= NEW
        assert all(a <= d for a, d in zip(done.accepted, done.drafted, strict=True))
        end = wanted[4]
        stopped = speculate(model, prompt, depths, NEW, [end])
        assert stopped.tokens == wanted[: wanted.index(end) + 1]


def test_right_drafts_are_all_accepted(model: Any):
    """A head of zeros: the model and its drafts say token 0, always."""
    head = model.output_layer.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.zero_()
    try:
        done = speculate(model, prompts(9)[0], 3, 13)
    finally:
        with torch.no_grad():
            head.copy_(kept)
    assert done.tokens == [0] * 13
    assert done.passes == 4  # 1 + 4 + 4 + 4
    assert done.accepted == done.drafted == [3, 3, 3]


def test_limits_end_texts_and_close_thinking(model: Any):
    free = decode(model, prompts(5), greedy, Limits(NEW))
    ends = free[0][5], free[0][3]
    ended = decode(model, prompts(5), greedy, Limits(NEW, ends))
    assert ended[0] == free[0][: min(free[0].index(end) for end in ends) + 1]
    close = [95, 94]
    budget = Limits(NEW, thinking_budget=4, close_thinking=close)
    for text, without in zip(decode(model, prompts(5), greedy, budget), free, strict=True):
        assert text[:4] == without[:4] and text[4:6] == close and len(text) == NEW
    # A text that has closed its thinking is left alone.
    open_until = Limits(NEW, thinking_budget=4, close_thinking=free[0][1:3])
    assert decode(model, prompts(5)[:1], greedy, open_until)[0] == free[0]


def test_the_sampler_draws_from_the_distribution():
    scores = torch.tensor([[2.0, 1.0, 0.0, -3.0]]).repeat(20_000, 1)
    for temperature, top_p, allowed in (
        (1.0, 1.0, 4),
        (0.7, 1.0, 4),
        (1.0, 0.7, 2),
        (2.0, 0.01, 1),
    ):
        drawn = sampler(temperature, top_p, seed=0)(scores)
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        expected = torch.softmax(scores[0] / temperature, 0)
        expected[allowed:] = 0
        expected /= expected.sum()
        assert (shares - expected).abs().max() < 0.015
    assert sampler(0.0, 1.0, 0) is greedy
    for coldest in (1e-45, 1e-300):
        assert not sampler(coldest, 1.0, seed=0)(scores).any()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperature": math.nan}, "--temperature and --speculate"),
        ({"temperature": -1.0}, "--temperature and --speculate"),
        ({"tokens": 0}, "--tokens 1 or more"),
        ({"top_p": 0.0}, "--top-p 0.0 must be above 0"),
        ({"thinking_budget": -1}, "--thinking-budget -1 must be 0 or more"),
        ({"json": Path("/nowhere/texts.json")}, "in no folder that exists"),
        ({"speculate": 2, "temperature": 1.0}, "decodes greedily"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], text: str):
    plain = {"temperature": 0.0, "top_p": 1.0, "tokens": 1, "speculate": 0}
    chosen = Namespace(**plain | {"thinking_budget": None, "json": None} | changes)
    nothing: Any = None  # not looked at yet
    with pytest.raises(ConfigError, match=text):
        generate(nothing, Path(), chosen)
