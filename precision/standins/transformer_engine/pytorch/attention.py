"""DotProductAttention on PyTorch's fused scaled_dot_product_attention.

Shapes: q_sbhd is [sequence, batch, heads, head dim]; k_sbgd and v_sbgd have `groups` heads.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .module import refuse

_CAUSAL = ("causal", "causal_bottom_right")


class DotProductAttention(nn.Module):
    """Mirrors `transformer_engine.pytorch.DotProductAttention` for sbhd tensors without
    context parallelism, masks or biases."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__()
        refuse(
            "DotProductAttention",
            attention_type=attention_type if attention_type != "self" else None,
            cp_group=cp_group if cp_group is not None and cp_group.size() > 1 else None,
            **unsupported,
        )
        self.attn_mask_type = attn_mask_type
        self.attention_dropout = attention_dropout
        self.softmax_scale = softmax_scale
        self.get_rng_state_tracker = get_rng_state_tracker

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: str | None = None,
        qkv_format: str = "sbhd",
        **unsupported: Any,
    ) -> Tensor:
        """q_sbhd, k_sbgd, v_sbgd -> [s, b, h * d]."""
        mask = attn_mask_type or self.attn_mask_type
        refuse(
            "DotProductAttention.forward",
            qkv_format=qkv_format if qkv_format != "sbhd" else None,
            attn_mask_type=mask if mask not in (*_CAUSAL, "no_mask") else None,
            attention_mask=attention_mask is not None,
            **unsupported,
        )
        s, b, h, d = query_layer.shape
        g = key_layer.shape[2]
        # Query groups are folded into the batch, so that the heads of a group read the same
        # keys and values through a stride of zero instead of a copy.
        q = query_layer.view(s, b, g, h // g, d).permute(1, 2, 3, 0, 4).flatten(0, 1)
        k, v = (
            t.permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(1).expand(-1, h // g, -1, -1)
            for t in (key_layer, value_layer)
        )
        dropout = self.attention_dropout if self.training else 0.0
        causal = mask in _CAUSAL and s > 1
        if causal and key_layer.shape[0] != s:
            raise NotImplementedError(
                "the Transformer Engine stand-in's DotProductAttention does not implement a "
                f"causal mask over {key_layer.shape[0]} keys for {s} queries"
            )
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=self.softmax_scale
        )
        return out.view(b, g, h // g, s, d).permute(3, 0, 1, 2, 4).reshape(s, b, h * d)
