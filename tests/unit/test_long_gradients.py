"""No gradient of a model in BF16 gets worse with the length of the sequence.

The oracle is the same model with the same weights in FP32. Rounding errors of single tokens average
out, so every error shrinks with the length, unless a sum over tokens is kept in BF16 somewhere.
"""

import re
from collections import defaultdict
from statistics import mean

import pytest
import torch
from torch import Tensor

SHORT, LONG = 512, 16384


def _model(precision: str) -> torch.nn.Module:
    from model.validate import validate_recipe
    from recipes.compose import load_recipe
    from train.build import build_state

    words = [f"stage.sequence_length={LONG}", "parallel.cross_entropy_loss_chunk=2048"]
    batch = ["stage.global_batch_size=1", "stage.micro_batch_size=1"]
    named = ["experiment=tiny", "run.dir=unused", f"precision={precision}"]
    recipe = load_recipe([*named, *batch, *words])
    chunk: torch.nn.Module = build_state(recipe, validate_recipe(recipe, 1))[0].chunks[0]
    return chunk


def _gradients(model: torch.nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """By name, in FP32, where Megatron sums them."""
    model.zero_grad_buffer()  # type: ignore[operator]
    inputs, labels = tokens[None, :-1], tokens[None, 1:]
    mask = torch.ones(inputs.shape)
    model(inputs, None, None, labels=labels, loss_mask=mask).float().sum().backward()
    return {n: p.main_grad.double().clone() for n, p in _parameters(model).items()}  # type: ignore[attr-defined]


def _parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {re.sub(r"^(module\.)+", "", name): p for name, p in model.named_parameters()}


def _tokens(length: int) -> Tensor:
    """As a text has them: a few of them are most of it."""
    generator = torch.Generator().manual_seed(length)
    share = 1 / torch.arange(1, 4097)
    return torch.multinomial(share, length + 1, replacement=True, generator=generator)


@pytest.mark.slow
def test_errors_shrink_with_the_length() -> None:
    from model.backends import install_backends
    from parallel.groups import one_rank

    install_backends("host")
    errors: dict[str, dict[int, float]] = defaultdict(dict)
    with one_rank():
        rounded, exact = _model("bf16"), _model("fp32")
        with torch.no_grad():
            for name, parameter in _parameters(exact).items():
                parameter.copy_(_parameters(rounded)[name])
        for length in (SHORT, LONG):
            tokens = _tokens(length)
            mine, wanted = (_gradients(model, tokens) for model in (rounded, exact))
            kinds = defaultdict(list)
            for name, gradient in wanted.items():
                error = ((mine[name] - gradient).norm() / gradient.norm()).item()
                kinds[re.sub(r"\d+", "N", name)].append(error)
            for kind, found in kinds.items():
                errors[kind][length] = mean(found)
    assert "embedding.word_embeddings.weight" in errors
    worse = {k: e for k, e in errors.items() if not e[LONG] < 1.1 * e[SHORT]}
    assert not worse
