"""The output head and its loss over chunks of tokens, so that logits never exist whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkedLoss(torch.autograd.Function):
    """(hidden [s, b, d], weight [v, d], labels [b, s], loss, tokens) -> losses [b, s].

    `loss(labels [b, c], logits [c, b, v])` gives [b, c]; v may be this rank's part of the
    vocabulary, if `loss` knows. A chunk has `tokens` tokens. Kept for backward are the inputs:
    logits are computed again, a third more work for the head. The weight's gradient is summed
    over chunks in FP32 (FP64).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.loss, ctx.tokens = loss, tokens
        chunks = _chunks(hidden, tokens)
        return torch.cat([loss(labels[:, c], hidden[c] @ weight.mT) for c in chunks], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for c in _chunks(hidden, ctx.tokens):
            with torch.enable_grad():
                logits = (hidden[c] @ weight.mT).detach().requires_grad_()
                losses = ctx.loss(labels[:, c], logits)
            (dlogits,) = torch.autograd.grad(losses, logits, dlosses[:, c])
            dhidden[c] = dlogits @ weight
            dweight += dlogits.flatten(0, 1).mT @ hidden[c].flatten(0, 1)
        return dhidden, dweight.to(weight.dtype), None, None, None


def _chunks(hidden: Tensor, tokens: int) -> Iterator[slice]:
    length, batch, _ = hidden.shape
    step = max(1, tokens // batch)
    for start in range(0, length, step):
        yield slice(start, start + step)
