"""DotProductAttention on PyTorch's fused attention.

Shapes: q_sbhd is [sequence, batch, heads, head dim]; k_sbgd and v_sbgd have `groups` heads.
Packed documents come as thd: [tokens, heads, head dim].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block_attention import EXACT_QUERIES, BlockAttention, Keys, OwnKeys, pieces_of
from .comm import Group, group_size
from .context import COMM_TYPES, GatheredKeys, RingKeys, gather_heads, scatter_heads, zigzag
from .module import refuse

_CAUSAL = ("causal", "causal_bottom_right")


class DotProductAttention(nn.Module):
    """Mirrors `transformer_engine.pytorch.DotProductAttention` for causal and unmasked attention
    of sbhd tensors and of packed documents (thd), with context parallelism.

    With context parallelism a rank holds two chunks of the sequence (context.py). Packed
    documents may cross chunks: the pack as a whole is zig-zag, where the real library wants each
    document cut into 2 cp parts.
    """

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
        cp_group: Group | None = None,
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
            cp_comm_type=cp_comm_type if cp_comm_type not in COMM_TYPES else None,
            **unsupported,
        )
        self.attn_mask_type = attn_mask_type
        self.attention_dropout = attention_dropout
        self.softmax_scale = softmax_scale
        self.get_rng_state_tracker = get_rng_state_tracker
        self.cp_group = cp_group if group_size(cp_group) > 1 else None
        self.cp_comm_type = cp_comm_type

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: str | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        **unsupported: Any,
    ) -> Tensor:
        """q_sbhd, k_sbgd, v_sbgd -> [s, b, h * d], or thd tensors -> [t, h * d].

        Args:
            cu_seqlens_q: where the documents of a pack end, over the tokens of all
                context-parallel ranks, from 0; thd only.
            cu_seqlens_kv: the same.
        """
        mask = attn_mask_type or self.attn_mask_type
        packed = qkv_format == "thd"
        supported = ("padding_causal",) if packed else (*_CAUSAL, "no_mask")
        refuse(
            "DotProductAttention.forward",
            qkv_format=qkv_format if qkv_format not in ("sbhd", "thd") else None,
            attn_mask_type=mask if mask not in supported else None,
            attention_mask=attention_mask is not None,
            **unsupported,
        )
        dropout = self.attention_dropout if self.training else 0.0
        if not packed and self.cp_group is None:
            if mask in _CAUSAL and not dropout and _is_long(query_layer, key_layer):
                return self._blockwise(query_layer, key_layer, value_layer, None)
            return self._dense(query_layer, key_layer, value_layer, mask)
        refuse(
            "DotProductAttention.forward over ranks or packed documents",
            attn_mask_type=mask if mask == "no_mask" else None,
            attention_dropout=dropout,
            device=query_layer.device if query_layer.device.type != "cpu" else None,
            documents=packed and not _same_documents(cu_seqlens_q, cu_seqlens_kv),
        )
        if not packed:
            return self._blockwise(query_layer, key_layer, value_layer, None)
        ends = cu_seqlens_q.tolist() if cu_seqlens_q is not None else None
        q, k, v = (t.unsqueeze(1) for t in (query_layer, key_layer, value_layer))
        return self._blockwise(q, k, v, ends).squeeze(1)

    def _dense(self, q_sbhd: Tensor, k_sbgd: Tensor, v_sbgd: Tensor, mask: str) -> Tensor:
        s, b, h, d = q_sbhd.shape
        g = k_sbgd.shape[2]
        # Query groups are folded into the batch, so that the heads of a group read the same
        # keys and values through a stride of zero instead of a copy.
        q = q_sbhd.view(s, b, g, h // g, d).permute(1, 2, 3, 0, 4).flatten(0, 1)
        k, v = (
            t.permute(1, 2, 0, 3).flatten(0, 1).unsqueeze(1).expand(-1, h // g, -1, -1)
            for t in (k_sbgd, v_sbgd)
        )
        dropout = self.attention_dropout if self.training else 0.0
        causal = mask in _CAUSAL and s > 1
        if causal and k_sbgd.shape[0] != s:
            raise NotImplementedError(
                "the Transformer Engine stand-in's DotProductAttention does not implement a "
                f"causal mask over {k_sbgd.shape[0]} keys for {s} queries"
            )
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=self.softmax_scale
        )
        return out.view(b, g, h // g, s, d).permute(3, 0, 1, 2, 4).reshape(s, b, h * d)

    def _blockwise(
        self, q_sbhd: Tensor, k_sbgd: Tensor, v_sbgd: Tensor, documents: list[int] | None
    ) -> Tensor:
        """Causal attention over ranks or packed documents."""
        group, heads_split = self.cp_group, self.cp_comm_type == "a2a"
        if group is not None and heads_split:
            q_sbhd, k_sbgd, v_sbgd = (gather_heads(t, group) for t in (q_sbhd, k_sbgd, v_sbgd))
        s, b, h, d = q_sbhd.shape
        keys: Keys = OwnKeys(s)
        chunks, total = [OwnKeys.whole(s)], s
        if group is not None and not heads_split:
            keys = (RingKeys if self.cp_comm_type == "p2p" else GatheredKeys)(group, s)
            chunks, total = zigzag(group.rank(), group.size(), s), group.size() * s
        documents = documents or [0, total]
        assert documents[0] == 0 and documents[-1] == total, "documents must cover all tokens"
        g = k_sbgd.shape[2]
        q = q_sbhd.reshape(s, b, g, h // g, d).permute(1, 2, 3, 0, 4).flatten(0, 1)
        kv = torch.stack([t.permute(1, 2, 0, 3).flatten(0, 1) for t in (k_sbgd, v_sbgd)])
        scale = self.softmax_scale or d**-0.5
        out = BlockAttention.apply(q, kv, pieces_of(chunks, documents), keys, scale)
        out = out.view(b, g, h // g, s, d).permute(3, 0, 1, 2, 4).reshape(s, b, h, d)
        if group is not None and heads_split:
            out = scatter_heads(out, group)
        return out.flatten(2)


def _is_long(queries: Tensor, keys: Tensor) -> bool:
    """Whether PyTorch's backward pass would lose precision (block_attention.py)."""
    s = queries.shape[0]
    few_bits = queries.device.type == "cpu" and queries.element_size() < 4
    return few_bits and s > EXACT_QUERIES and keys.shape[0] == s


def _same_documents(queries: Tensor | None, keys: Tensor | None) -> bool:
    """Whether queries and keys are packed alike: self-attention."""
    return (
        queries is not None and keys is not None and (keys is queries or torch.equal(queries, keys))
    )
