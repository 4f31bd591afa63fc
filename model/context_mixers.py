"""Mamba mixers for sequences that are split between ranks, put into Megatron's layer spec.

Megatron's own mixer gives every rank the whole sequence for its share of the heads (two
all-to-alls). `StatePassingMixer` lets every rank keep its tokens and all heads. `WholePackMixer`
is Megatron's with documents packed into one zig-zag sequence. Parameters, names and checkpoints
are Megatron's in all of them.
"""

from copy import copy
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from model.mamba_functions import Sizes
from model.state_passing import ScanParameters, scan_segments
from parallel.context import zigzag_segments


class _Alone:
    """The group of a mixer that shares nothing: Megatron asks for its size."""

    def size(self) -> int:
        return 1


class StatePassingMixer(MambaMixer):
    """Megatron's mixer with the scan of state_passing.py: convolution halos and states cross
    ranks, tokens do not, and heads need not divide between ranks.

    With selective recomputation, whatever its modules, the mixer is computed again in the backward
    pass and keeps nothing but its input: it would keep more than all other layers together.
    """

    def __init__(self, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        alone = copy(pg_collection)
        alone.cp = _Alone()
        super().__init__(*args, pg_collection=alone, **kwargs)
        self._context, self._tensor = pg_collection.cp, pg_collection.tp
        self._recompute = self.config.recompute_granularity == "selective"

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[l / cp, b, d] -> the same, in Megatron's zig-zag layout."""
        if inference_context is not None or inference_params is not None:
            raise NotImplementedError("parallel.mamba_context=state is for training")
        documents = None if packed_seq_params is None else packed_seq_params.seq_idx
        mix = partial(self._mix, documents=documents)
        if not (self._recompute and self.training):
            return mix(hidden_states)
        if self.config.fp8 or self.config.fp4:
            # Transformer Engine's keeps the recipe of the forward pass, as in Megatron's MoE layer.
            return te_checkpoint(mix, False, get_cuda_rng_tracker, self._tensor, hidden_states)
        return checkpoint(mix, False, hidden_states)

    def _mix(
        self, hidden_states: Tensor, *, documents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        zxbcdt_lbc, _ = self.in_proj(hidden_states)
        segments = zigzag_segments(self._context, self._context.size() * zxbcdt_lbc.shape[0])
        parameters = ScanParameters(
            self.conv1d_weight.squeeze(1),
            self.conv1d_bias,
            self.dt_bias.float(),
            -torch.exp(self.A_log.float()),
            self.D,
            Sizes(self.nheads_local_tp, self.headdim, self.ngroups_local_tp, self.d_state),
            self.chunk_size,
        )
        zxbcdt_blc = zxbcdt_lbc.transpose(0, 1).contiguous()
        y = scan_segments(zxbcdt_blc, parameters, segments, documents)
        out, bias = self.out_proj(self.norm(y.transpose(0, 1).contiguous()))
        return out, bias


class _WholePack:
    """Megatron's all-to-alls without their per-document order of tokens, which needs every
    document cut into 2 cp equal parts."""

    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exchange, name)

    def pre_conv_ssm(self, x: Tensor, packed_seq_params: Any = None) -> Tensor:
        return self._exchange.pre_conv_ssm(x)

    def post_conv_ssm(self, x: Tensor, packed_seq_params: Any = None) -> Tensor:
        return self._exchange.post_conv_ssm(x)


class WholePackMixer(MambaMixer):
    """Megatron's mixer for packed documents that are zig-zag as one sequence."""

    cp: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cp = _WholePack(self.cp)
