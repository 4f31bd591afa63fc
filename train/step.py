"""The parts of one optimizer step that Megatron's schedules call back, and what they measure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.pattern import Pattern
from parallel import wire
from recipes.stages import Shape
from train.batches import packed_documents


@dataclass
class StepResult:
    """What one step measured; the same on every rank."""

    loss: float
    """Mean cross-entropy of the next token, in nats."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    learning_rate: float = 0.0
    """What the update was made with."""
    zero_grad_share: float | None = None
    """Share of gradient elements that are exactly zero."""
    mtp_losses: list[float] = field(default_factory=list)
    """Mean cross-entropy of each multi-token-prediction depth, in nats."""
    load_balance_loss: float | None = None
    """Load-balancing loss before its coefficient, mean over the MoE layers; 1 is balance."""
    max_violation: list[float] = field(default_factory=list)
    """MaxVio of each MoE layer, MTP last: busiest expert's load / mean load - 1."""
    wire: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What all ranks sent in this step, by purpose (`parallel.wire.summary`)."""
    wire_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """Time in collectives by purpose and group, mean over ranks."""
    updated: bool = True
    """Whether the weights moved."""
    dropped: bool = False
    """The batch was not read at all: it caused a rollback before."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def masked_loss_sum(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the token losses of a micro batch.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        losses: [b, s], cross-entropy of each token.

    Returns:
        (sum, number of tokens, both detached in one tensor): Megatron divides the gradients by
        the token count of the whole batch at the end of the step.
    """
    total = (losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    return total, tokens.to(torch.int), torch.stack([total.detach(), tokens]).double()


def forward_step(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """One micro batch forward, in the form Megatron's schedules call."""
    batch = next(batches)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_documents(batch),
    )
    return output, partial(masked_loss_sum, batch["loss_mask"])


def run_schedule(
    chunks: list[Any],
    batches: list[Iterator[dict[str, Tensor]]],
    num_microbatches: int,
    shape: Shape,
    forward_only: bool,
) -> list[Tensor]:
    """One pass of Megatron's schedule.

    Args:
        chunks: this rank's model chunks.
        batches: the same micro batches for each chunk, an iterator each: Megatron takes from
            every one of them.
        num_microbatches: of this rank.
        shape: sizes of the micro batches.

    Returns:
        [loss sum, tokens] of each micro batch; empty but on the last pipeline stage.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=shape.sequence_length,
        micro_batch_size=shape.micro_batch_size,
        forward_only=forward_only,
    )


class Routers:
    """Every router of this rank's model: their loads and selection biases.

    `finalize` is the model's finalize_model_grads_func: it reads the loads just before
    Megatron resets them.
    """

    def __init__(self, model_chunks: list[Any], pattern: Pattern) -> None:
        experts = [i for i, symbol in enumerate(pattern.main) if symbol == "E"]
        self.num_layers = len(experts) + pattern.mtp.count("E")
        self.balance_terms = len(experts) + pattern.mtp.count("E") * pattern.mtp_depths
        """Load-balancing losses of one forward pass: an MTP block adds one a depth."""
        self._modules: list[Any] = []
        self._slots: list[int] = []
        slot = len(experts)
        for chunk in model_chunks:
            for name, module in chunk.named_modules():
                if getattr(module, "local_tokens_per_expert", None) is None:
                    continue
                self._modules.append(module)
                if "mtp." in name:
                    # Blocks of further depths that are not repeated share the slots of the
                    # first; the last one is shown.
                    self._slots.append(
                        len(experts) + (slot - len(experts)) % pattern.mtp.count("E")
                    )
                    slot += 1
                else:
                    self._slots.append(experts.index(module.layer_number - 1))
        self.max_violation = torch.zeros(self.num_layers, dtype=torch.float64)
        self._loads: Tensor | None = None

    def finalize(self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Measure the load of this step, then let Megatron finish the gradients."""
        from megatron.core.distributed import finalize_model_grads

        if self._modules:
            self._measure()
        with wire.install().purpose(wire.GRADIENTS):
            finalize_model_grads(model, num_tokens, **kwargs)

    def biases(self) -> list[Tensor]:
        """A copy of every selection bias, to undo the update of a dropped step."""
        return [router.expert_bias.clone() for router in self._modules]

    def restore_biases(self, biases: list[Tensor]) -> None:
        """Put back what `biases` copied."""
        for router, bias in zip(self._modules, biases, strict=True):
            router.expert_bias.copy_(bias)

    def _measure(self) -> None:
        from megatron.core import parallel_state

        loads = torch.stack([r.local_tokens_per_expert for r in self._modules]).double()
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(loads, group=group)
        violation = loads.amax(1) / loads.mean(1).clamp(min=1e-9) - 1
        self.max_violation.zero_()
        self.max_violation[self._slots] = violation.cpu()
        self._loads = loads

    def expert_load(self, num_experts: int) -> list[list[int]]:
        """Tokens each expert of each layer got in the last step, MTP last; every rank must call
        it."""
        from megatron.core import parallel_state

        device = torch.cuda.current_device()
        table = torch.zeros(self.num_layers, num_experts, dtype=torch.float64, device=device)
        if self._loads is not None:
            table[self._slots] = self._loads
        dist.all_reduce(table, group=parallel_state.get_pipeline_model_parallel_group())
        return [[int(tokens) for tokens in layer] for layer in table.tolist()]


def reduce_losses(
    reports: list[Tensor], routers: Routers | None, mtp_depths: int, num_microbatches: int
) -> StepResult:
    """Everything the forward passes measured, over all ranks, in one all-reduce.

    Args:
        reports: [loss sum, tokens] of each micro batch; empty but on the last pipeline stage.
        routers: None when evaluating: only the loss is measured then.
        mtp_depths: number of multi-token-prediction depths.
        num_microbatches: micro batches of this rank.
    """
    from megatron.core import parallel_state

    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    model_ranks = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
    balance = _load_balance(num_microbatches) if routers else 0.0
    values = torch.cat(
        [
            torch.stack(reports).sum(0).cpu() if reports else torch.zeros(2, dtype=torch.float64),
            _mtp_losses(mtp_depths if routers else 0, num_microbatches) * last_stage,
            torch.tensor([balance], dtype=torch.float64),
            routers.max_violation if routers else torch.zeros(0, dtype=torch.float64),
        ]
    ).to(torch.cuda.current_device())
    dist.all_reduce(values)
    # Ranks that hold the same layers report alike (their tokens were summed before), so a
    # mean over them is the value; the loss is a ratio of two sums.
    total, tokens, *rest = values.tolist()
    depths = mtp_depths if routers else 0
    mtp = [v / model_ranks for v in rest[:depths]]
    if routers and routers.balance_terms:
        # Summed over the stages, each rank of a tensor and context group with a part of it.
        replicas = parallel_state.get_data_parallel_world_size()
        load_balance = rest[depths] / replicas / routers.balance_terms
    else:
        load_balance = None
    return StepResult(
        loss=total / tokens if tokens else math.nan,
        grad_norm=math.nan,
        mtp_losses=mtp,
        load_balance_loss=load_balance,
        max_violation=[v / model_ranks for v in rest[depths + 1 :]],
    )


def _mtp_losses(depths: int, num_microbatches: int) -> Tensor:
    """This rank's mean loss of each depth from Megatron's tracker, which is cleared."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    values = MTPLossLoggingHelper.tracker.get("loss_values")
    if depths == 0 or values is None:
        return torch.zeros(depths, dtype=torch.float64)
    losses = values.double().cpu() / num_microbatches
    MTPLossLoggingHelper.clean_metrics_in_tracker()
    return losses


def _load_balance(num_microbatches: int) -> float:
    """This rank's share of the load-balancing losses, summed over its layers; the tracker is
    cleared."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    tracker = get_moe_metrics_tracker()
    total = sum(
        float(entry.values.sum())
        for name, entry in tracker.metrics.items()
        if name.endswith("load_balancing_loss")
    )
    tracker.clear()
    return total / num_microbatches
