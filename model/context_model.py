"""Megatron's model for long and packed sequences: what its loss and its multi-token prediction
do not do.

- Logits of a long sequence never exist whole: the head runs over chunks of tokens, forward and
  again in the backward pass (S x V logits would be most of a rank's memory).
- Token counts of multi-token prediction are those of the whole sequence. Megatron weights a
  depth by the counts of one rank, which differ where a rank holds the end of the sequence.
- Documents packed into one sequence that is zig-zag as a whole end where they end, on any rank.

Shapes: hidden states are [s, b, d], labels, masks and losses [b, s], of this rank's tokens.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
    MultiTokenPredictionLayer,
    roll_tensor,
)
from torch import Tensor

from model.chunked_loss import ChunkedLoss
from parallel.context import zigzag_segments


class ContextModel(HybridModel):
    """`HybridModel` with the losses described above.

    Args:
        loss_chunk: tokens whose logits exist at a time; None: all.
        others: HybridModel's.
    """

    post_process: bool

    def __init__(self, *others: Any, loss_chunk: int | None = None, **named: Any) -> None:
        super().__init__(*others, **named)
        self._loss_chunk = loss_chunk
        assert self.config.calculate_per_token_loss and not self.config.mtp_detach_heads

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *others: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **named: Any,
    ) -> Tensor:
        """As Megatron's: losses if labels are given, on the last pipeline stage."""
        arguments = (input_ids, position_ids, attention_mask, *others)
        named |= {"packed_seq_params": packed_seq_params}
        if labels is None or loss_mask is None or not self.post_process:
            return super().forward(*arguments, labels=labels, loss_mask=loss_mask, **named)
        # Megatron's forward pass ends before the loss on every stage but the last.
        self.post_process = False
        try:
            hidden = super().forward(*arguments, **named)
        finally:
            self.post_process = True
        return self._losses(hidden, labels, loss_mask, packed_seq_params)

    def _losses(
        self,
        hidden: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Losses of the next token; those of further ones go into the backward pass."""
        depths = self.config.mtp_num_layers if self.mtp_process else 0
        main, *further = hidden.chunk(1 + (depths or 0))
        ends = document_ends(packed_seq_params, self.cp_group, labels.shape[1])
        targets = [(labels, loss_mask)]
        for _ in further:
            label, mask = targets[-1]
            targets.append((roll(label, self.cp_group, ends), roll(mask, self.cp_group, ends)))
        counts = torch.stack([mask.sum() for _, mask in targets])
        dist.all_reduce(counts, group=self.cp_group)
        for depth, (state, target) in enumerate(zip(further, targets[1:], strict=True)):
            losses = self._token_losses(state, target[0]) * target[1]
            count = counts[depth + 1].clamp(min=1)
            self._report(depth, losses.detach().sum() / count)
            scale = self.config.mtp_loss_scaling_factor / len(further)
            # Megatron divides all gradients by the tokens of the main loss, counts[0].
            main = MTPLossAutoScaler.apply(main, scale * losses * (counts[0] / count))
        return self._token_losses(main, labels)

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self._loss_chunk is None:
            logits, _ = self.output_layer(hidden)
            return self.compute_language_model_loss(labels, logits)
        # The head is called, as a module: DDP waits in its hooks for weights that are gathered
        # while the layers before it compute.
        self.output_layer.forward = functools.partial(self._chunked_losses, labels=labels)
        try:
            return self.output_layer(hidden)
        finally:
            del self.output_layer.forward

    def _chunked_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        assert self._loss_chunk is not None
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        return ChunkedLoss.apply(
            hidden,
            self.output_layer.weight,
            labels,
            self.compute_language_model_loss,
            self._loss_chunk,
        )

    def _report(self, depth: int, share: Tensor) -> None:
        """Give Megatron's tracker this rank's part of a depth's mean loss. The tracker is read
        as a mean over ranks; accepted tokens, which it can count too, are not counted here."""
        if not self.training:
            return
        nothing = torch.zeros_like(share)
        MTPLossLoggingHelper.save_metrics_to_tracker(
            share * self.cp_group.size(),
            nothing,
            nothing,
            depth,
            self.config.mtp_num_layers,
            avg_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


class DocumentPredictionLayer(MultiTokenPredictionLayer):
    """Megatron's multi-token-prediction layer, whose shift ends at documents that are packed
    into one zig-zag sequence (Megatron's own wants every document cut into 2 cp parts)."""

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        embedding: Any,
        hidden_states: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> Any:
        ends = document_ends(packed_seq_params, self.cp_group, input_ids.shape[1])

        def embed(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            # These are the shifted ones, and those that are returned.
            input_ids[..., ends] = 0
            position_ids[..., ends] = 0
            return embedding(input_ids=input_ids, position_ids=position_ids)

        return super()._get_embeddings(
            input_ids, position_ids, embed, hidden_states, None, padding_mask
        )


def document_ends(
    packed_seq_params: PackedSeqParams | None, cp_group: dist.ProcessGroup, length: int
) -> list[int]:
    """Where this rank's `length` tokens have the last token of a document."""
    if packed_seq_params is None:
        return []
    last = [end - 1 for end in packed_seq_params.cu_seqlens_q[1:].tolist()]
    if cp_group.size() == 1:
        return last
    return zigzag_segments(cp_group, length * cp_group.size()).rows(last)


def roll(t: Tensor, cp_group: dist.ProcessGroup, ends: list[int]) -> Tensor:
    """Every token's successor [b, s]; zero for the last token of a document or of all."""
    rolled, _ = roll_tensor(t, cp_group=cp_group)
    rolled[..., ends] = 0
    return rolled
