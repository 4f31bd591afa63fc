"""Multi-token prediction: depth k learns the token k + 1 places ahead, and sees none of it.

Megatron shifts labels, masks and inputs inside the model. Here the loss of each depth is asked
what it depends on.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.hybrid import build_model, transformer_config
from recipes.compose import load_recipe
from tests.unit.world import fresh_world

LENGTH, VOCABULARY, DEPTHS = 16, 64, 2
SPOT = 9
"""The only position whose label counts."""


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    """Causal parts only: an MoE layer would balance its load over all positions."""
    with fresh_world(seed=1):
        recipe = load_recipe(
            [
                "experiment=tiny",
                "precision=fp32",
                "model.hybrid_layer_pattern=M*/*/*",
                f"model.vocab_size={VOCABULARY}",
            ]
        )
        config = transformer_config(recipe.model, recipe.precision, recipe.parallel)
        yield build_model(recipe, config).train()


def depth_losses(model: torch.nn.Module, tokens: Tensor, labels: Tensor) -> list[float]:
    """Loss of each depth on tokens, labels [1, s]; only the label at SPOT counts."""
    from train.step import _mtp_losses

    mask = torch.zeros(1, LENGTH)
    mask[0, SPOT] = 1
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        model(tokens, positions, None, labels=labels, loss_mask=mask)
    return _mtp_losses(DEPTHS, 1).tolist()


def changed(row: Tensor, position: int) -> Tensor:
    other = row.clone()
    other[0, position] = (other[0, position] + 7) % VOCABULARY
    return other


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor]:
    """Tokens and the labels of next-token prediction."""
    line = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return line[:, :-1], line[:, 1:]


def test_the_label_that_counts_is_the_one_at_the_spot(
    model: torch.nn.Module, text: tuple[Tensor, Tensor]
) -> None:
    tokens, labels = text
    base = depth_losses(model, tokens, labels)
    assert all(loss > 1 for loss in base)
    for position in range(LENGTH):
        losses = depth_losses(model, tokens, changed(labels, position))
        moved = [a != b for a, b in zip(losses, base, strict=True)]
        assert moved == [position == SPOT] * DEPTHS, position


def test_a_depth_sees_the_text_up_to_its_label_and_no_further(
    model: torch.nn.Module, text: tuple[Tensor, Tensor]
) -> None:
    """labels[SPOT] is the token after tokens[SPOT]. Depth k predicts it at position SPOT - k,
    from the main model's view of the text so far and the k tokens that follow."""
    tokens, labels = text
    base = depth_losses(model, tokens, labels)
    for position in range(LENGTH):
        losses = depth_losses(model, changed(tokens, position), labels)
        moved = [a != b for a, b in zip(losses, base, strict=True)]
        assert moved == [position <= SPOT] * DEPTHS, position
