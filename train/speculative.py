"""Speculative decoding with the multi-token-prediction block: the same text as greedy decoding,
in fewer passes of the model.

A pass reads the text, the next token and the drafts that follow it. Where the model itself says
what a draft said, the draft is right and its position says what comes next, for nothing; the
first wrong one is replaced by what the model says. Then the block drafts anew: depth k predicts
the token k + 1 places ahead from the hidden state of the depth before and the tokens between.

Shapes: s tokens of one text, V vocabulary, D hidden_size.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Speculation:
    """What came of it."""

    tokens: list[int] = field(default_factory=list)
    """New tokens, the same as of greedy decoding."""
    passes: int = 0
    """Passes of the whole model."""
    drafted: list[int] = field(default_factory=list)
    """Drafts of each depth."""
    accepted: list[int] = field(default_factory=list)
    """Of these, those that were right and followed right ones."""

    @property
    def tokens_per_pass(self) -> float:
        """How many tokens a pass of the model gave."""
        return len(self.tokens) / max(self.passes, 1)


def speculate(
    model: Any,
    prompt: Tensor,
    depths: int,
    max_tokens: int,
    ends: Collection[int] = (),
    advance: Callable[[int], object] = lambda tokens: None,
) -> Speculation:
    """Continue one text greedily.

    Args:
        model: HybridModel with an MTP block, on one rank, in evaluation mode.
        prompt: [s] tokens.
        depths: drafts of a pass; a repeated block can go deeper than it was trained.
        max_tokens: new tokens, at most.
        ends: tokens that end the text.
        advance: is told of new tokens.
    """
    result = Speculation(drafted=[0] * depths, accepted=[0] * depths)
    text: list[int] = prompt.tolist()
    drafts: list[int] = []
    with torch.no_grad():
        while len(result.tokens) < max_tokens:
            hidden, said = _main(model, [*text, *drafts], prompt.device)
            result.passes += 1
            right = 0
            while right < len(drafts) and drafts[right] == said[len(text) - 1 + right]:
                right += 1
            for depth in range(len(drafts)):
                result.drafted[depth] += 1
                result.accepted[depth] += depth < right
            new = [*drafts[:right], said[len(text) - 1 + right]]
            new = new[: max_tokens - len(result.tokens)]
            new = new[: next((i for i, token in enumerate(new, 1) if token in ends), len(new))]
            result.tokens += new
            advance(len(new))
            if new[-1] in ends:
                break
            text += new
            # The hidden states of all but the newest token, which has not been read yet.
            drafts = _draft(model, hidden[: len(text) - 1], text, depths)
    return result


def _main(model: Any, tokens: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """Hidden states [s, 1, D] of the decoder, and what it says follows each token."""
    model = _inner(model)
    ids = torch.tensor([tokens], device=device)
    positions = torch.arange(len(tokens), device=device)[None]
    embedded = model.embedding(input_ids=ids, position_ids=positions)
    hidden = model.decoder(hidden_states=embedded, attention_mask=None)
    logits, _ = model.output_layer(hidden)
    return hidden, logits[:, 0].argmax(-1).tolist()


def _draft(model: Any, hidden: Tensor, text: list[int], depths: int) -> list[int]:
    """Drafts that follow the text.

    Args:
        model: HybridModel.
        hidden: [s - 1, 1, D], decoder output at all but the last token.
        text: s tokens.
        depths: how many.
    """
    model = _inner(model)
    blocks = model.mtp.layers
    device = hidden.device
    positions = torch.arange(len(hidden), device=device)[None]
    known = list(text)
    for depth in range(depths):
        following = torch.tensor([known[depth + 1 :]], device=device)
        block = blocks[min(depth, len(blocks) - 1)]
        hidden = block.forward_single_position(
            hidden, following, positions, embedding=model.embedding
        )
        logits, _ = model.output_layer(hidden[-1:])
        known.append(int(logits[0, 0].argmax()))
    return known[len(text) :]


def _inner(model: Any) -> Any:
    """The HybridModel inside Megatron's mixed-precision wrapper."""
    return getattr(model, "module", model)
