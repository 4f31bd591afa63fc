"""Cross-entropy over a vocabulary that may be split between tensor-parallel ranks.

Shapes: logits [..., V / tp], targets [...], loss [...] in FP32. Rows are processed in blocks
that stay in cache, so the FP32 copy of the logits never exists whole.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Group, group_size
from .module import refuse

_BLOCK_ELEMENTS = 1 << 18
"""Logits of one block: 1 MiB in FP32."""


class _CrossEntropy(torch.autograd.Function):
    """loss = log(sum exp x) - x_target; d loss / d x = softmax(x) - onehot(target).

    Like the real library it keeps the probabilities in the logits' dtype for the backward
    pass. The target's own entry is computed in FP32, where p - 1 keeps its digits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: Group | None, ignore_idx: int
    ) -> Tensor:
        x = logits.reshape(-1, logits.shape[-1])
        rows, vocab = x.shape
        first = vocab * dist.get_rank(group) if group is not None else 0
        ignored = target.reshape(-1) == ignore_idx
        local = target.reshape(-1) - first
        here = (local >= 0) & (local < vocab)
        local = local.where(here, 0).unsqueeze(1)
        chosen = x.gather(1, local).squeeze(1).float()
        log_total = x.new_empty(rows, dtype=torch.float32)
        probabilities = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        step = max(1, _BLOCK_ELEMENTS // vocab)
        for i in range(0, rows, step):
            block = slice(i, i + step)
            share = torch.softmax(x[block].float(), 1)
            # log(sum exp x) from the largest entry, whose share is never below 1 / V.
            log_total[block] = x[block].amax(1).float() - share.amax(1).log_()
            if probabilities is not None:
                probabilities[block] = share
        scale = None
        if group is not None:
            chosen.masked_fill_(~here, 0.0)
            dist.all_reduce(chosen, group=group)
            peak = log_total.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            total = (log_total - peak).exp_()
            dist.all_reduce(total, group=group)
            whole = peak + total.log_()
            scale, log_total = (log_total - whole).exp_(), whole
        log_p = chosen - log_total
        ctx.save_for_backward(probabilities, local, here & ~ignored, log_p, scale, ignored)
        ctx.shape = logits.shape
        return (-log_p).masked_fill_(ignored, 0.0).view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, local, here, log_p, scale, ignored = ctx.saved_tensors
        grad = grad.reshape(-1).float().masked_fill(ignored, 0.0)
        rows = grad if scale is None else grad * scale
        # In place, like the real library: a second backward pass through the same graph is
        # refused by autograd, which sees that what it saved has changed.
        dx = probabilities.mul_(rows.unsqueeze(1).to(probabilities.dtype))
        at_target = ((log_p.exp() - 1) * grad).to(dx.dtype)
        owned = here.nonzero().squeeze(1)
        dx[owned, local[owned, 0]] = at_target[owned]
        return dx.view(ctx.shape), None, None, None


def parallel_cross_entropy(
    inp: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    reduce_loss: bool = False,
    dist_process_group: Group | None = None,
    ignore_idx: int = -100,
    is_cg_capturable: bool = False,
) -> Tensor:
    """Mirrors `transformer_engine.pytorch.cross_entropy.parallel_cross_entropy`.

    Args:
        inp: logits [..., V], or this rank's [..., V / tp] of them.
        target: token ids [...] in [0, V); rows equal to `ignore_idx` cost nothing.
        dist_process_group: the group the vocabulary is split over.

    Returns:
        Loss of each row, FP32, shape of `target`; its mean if `reduce_loss`.
    """
    refuse(
        "parallel_cross_entropy",
        label_smoothing=label_smoothing,
        is_cg_capturable=is_cg_capturable,
    )
    group = dist_process_group if group_size(dist_process_group) > 1 else None
    loss = _CrossEntropy.apply(inp, target, group, ignore_idx)
    return loss.mean() if reduce_loss else loss
