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
    pass. The target's own entry is kept apart in FP32, where p - 1 would lose its digits.
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
        peak, total, chosen = (x.new_empty(rows, dtype=torch.float32) for _ in range(3))
        # The caller's backward pass needs only the probabilities, never the logits again.
        probabilities = torch.empty_like(x) if logits.requires_grad else None
        step = max(1, _BLOCK_ELEMENTS // vocab)
        for i in range(0, rows, step):
            block = slice(i, i + step)
            wide = x[block].to(torch.float32, copy=True)
            chosen[block] = wide.gather(1, local[block]).squeeze(1)
            peak[block] = top = wide.amax(1)
            wide.sub_(top.unsqueeze(1)).exp_()
            total[block] = share = wide.sum(1)
            if probabilities is not None:
                probabilities[block] = wide.div_(share.unsqueeze(1))
        scale = None
        if group is not None:
            chosen.masked_fill_(~here, 0.0)
            highest = peak.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            own = total * (peak - highest).exp()
            total = own.clone()
            dist.all_reduce(total, group=group)
            dist.all_reduce(chosen, group=group)
            peak, scale = highest, own / total
        log_p = chosen - peak - total.log()
        ctx.save_for_backward(probabilities, local, here & ~ignored, log_p, scale, ignored)
        ctx.shape = logits.shape
        return (-log_p).masked_fill_(ignored, 0.0).view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, local, here, log_p, scale, ignored = ctx.saved_tensors
        grad = grad.reshape(-1).float().masked_fill(ignored, 0.0)
        rows = grad if scale is None else grad * scale
        dx = probabilities * rows.unsqueeze(1).to(probabilities.dtype)
        at_target = (log_p.exp() - 1) * grad
        entries = torch.where(here, at_target.to(dx.dtype), dx.gather(1, local).squeeze(1))
        dx.scatter_(1, local, entries.unsqueeze(1))
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
