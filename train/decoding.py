"""Continuing texts with a model, token by token.

A text is read once; then each step costs the same: Mamba layers keep a state of constant size,
attention layers their keys and values, in Megatron's static inference context. All texts of a
batch have the same length.

Shapes: b texts, s tokens, V vocabulary, D hidden_size.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Choose = Callable[[Tensor], Tensor]
"""[b, V] logits -> [b] tokens."""

_KERNELS = ("causal_conv1d_update", "selective_state_update")
"""One-token steps of Mamba that need a GPU."""


def greedy(logits: Tensor) -> Tensor:
    """The most probable token."""
    return logits.argmax(-1)


def sampler(temperature: float, top_p: float, seed: int) -> Choose:
    """Tokens drawn from softmax(logits / temperature), restricted to the most probable ones that
    have `top_p` of the mass together (nucleus sampling, arXiv 1904.09751); temperature 0 is
    greedy."""
    if temperature == 0:
        return greedy
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        # Largest first taken off: no temperature is so low that a quotient overflows.
        scores = logits.double().cpu()
        probabilities = torch.softmax((scores - scores.amax(-1, keepdim=True)) / temperature, -1)
        ordered, tokens = probabilities.sort(descending=True)
        # A token stays if those before it do not reach the share yet; the first always does.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        drawn = torch.multinomial(ordered, 1, generator=generator)
        return tokens.gather(-1, drawn)[:, 0].to(logits.device)

    return choose


@dataclass(frozen=True)
class Limits:
    """When a text ends."""

    tokens: int
    """New tokens of a text, at most."""
    ends: Collection[int] = ()
    """Tokens that end a text."""
    thinking_budget: int | None = None
    """After so many new tokens without `close_thinking` it is put in; None: no budget."""
    close_thinking: Sequence[int] = field(default_factory=tuple)
    """The tokens of `</think>`."""


def decode(
    model: Any,
    prompts: Tensor,
    choose: Choose,
    limits: Limits,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[list[int]]:
    """Continue texts.

    Args:
        model: Megatron's HybridModel on one rank, in evaluation mode.
        prompts: [b, s] tokens.
        choose: `greedy` or a `sampler`.
        limits: when to stop.
        advance: is told of new tokens.

    Returns:
        The new tokens of each text, the end token included.
    """
    count, length = prompts.shape
    texts = [_Text(limits) for _ in range(count)]
    with _inference(model, count, length + limits.tokens) as context:
        logits = _step(model, prompts, context)
        for _ in range(limits.tokens):
            chosen = choose(logits)
            kept = [t.take(int(c)) for t, c in zip(texts, chosen, strict=True)]
            advance(count)
            if all(t.ended for t in texts):
                break
            tokens = torch.tensor(kept, device=prompts.device)[:, None]
            logits = _step(model, tokens, context)
    return [t.tokens for t in texts]


class _Text:
    """The new tokens of one text, and what its limits make of the model's choice."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tokens: list[int] = []
        self.ended = False
        self._forced: list[int] = []

    def take(self, chosen: int) -> int:
        """Add the chosen token, or the one a budget asks for; returns what was added."""
        if self.ended:
            return chosen  # of no consequence
        limits, close = self.limits, list(self.limits.close_thinking)
        if len(self.tokens) == limits.thinking_budget and not _contains(self.tokens, close):
            self._forced = close
        token = self._forced[0] if self._forced else chosen
        self._forced = self._forced[1:]
        self.tokens.append(token)
        self.ended = token in limits.ends or len(self.tokens) == limits.tokens
        return token


def _contains(tokens: list[int], part: list[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens) - len(part) + 1))


@contextmanager
def _inference(model: Any, batch: int, length: int) -> Iterator[Any]:
    """Megatron's inference mode and a context with room for so many tokens."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    with (
        InferenceMode.active(),
        torch.no_grad(),
        _mamba_step_without_triton(),
        _mamba_step_of_a_batch(model, batch),
    ):
        yield StaticInferenceContext(batch, length)


@contextmanager
def _mamba_step_without_triton() -> Iterator[None]:
    """On a host, let Mamba layers take Megatron's step in plain PyTorch: it chooses by whether
    these kernels can be imported, which Triton's can everywhere."""
    from megatron.core.ssm import mamba_mixer

    kernels = {} if torch.cuda.is_available() else {n: getattr(mamba_mixer, n) for n in _KERNELS}
    for name in kernels:
        setattr(mamba_mixer, name, None)
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(mamba_mixer, name, kernel)


@contextmanager
def _mamba_step_of_a_batch(model: Any, batch: int) -> Iterator[None]:
    """In Megatron 0.19.2 the step of a static context takes the texts of a batch for tokens of one
    text, unless it is told the place of each text's state."""
    from megatron.core.ssm.mamba_mixer import MambaMixer

    mixers = [m for m in model.modules() if isinstance(m, MambaMixer)]
    for mixer in mixers:
        places = torch.arange(batch, device=mixer.conv1d_weight.device, dtype=torch.int32)
        mixer._decode = partial(mixer._decode, batch_indices=places)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer._decode


def _step(model: Any, tokens: Tensor, context: Any) -> Tensor:
    """Read tokens [b, s] after what the context holds; logits [b, V] of the next."""
    start, count = context.sequence_len_offset, tokens.shape[1]
    positions = torch.arange(start, start + count, device=tokens.device)[None].expand_as(tokens)
    logits = model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
    context.sequence_len_offset += count
    context.enable_decode_mode()
    return logits[:, -1]
