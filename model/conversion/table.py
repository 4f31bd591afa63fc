"""The one table of names: which tensors of a Hugging Face folder are which of Megatron's.

A row gives the names inside a layer on both sides and how the values correspond. `pairs` writes
the table out for a model; both directions of the conversion follow the result, so that nothing
is said twice. Names are those of released checkpoints and those Megatron's `sharded_state_dict`
writes, which do not depend on the layout a checkpoint was saved in.

Sizes: d hidden_size, V vocab_size, I mamba_num_heads * mamba_head_dim, GN mamba_num_groups *
mamba_state_dim, H mamba_num_heads, K mamba_d_conv, Q num_attention_heads * kv_channels,
G num_query_groups, h kv_channels, E experts, m width of an expert, l latent width (d without
LatentMoE), s width of the shared expert, f width of a dense MLP.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from model.pattern import parse_pattern
from recipes.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

type Shape = tuple[int, ...]
type Sizes = dict[str, int]
type Tensors = Sequence["Tensor"]


@dataclass(frozen=True)
class Spec:
    """A tensor of one side."""

    name: str
    shape: Shape
    index: int | None = None
    """Only this slice of the leading axis, which has `of` entries; `shape` is the slice's."""
    of: int = 0


class Transform(Protocol):
    """How the values of a row's two sides correspond."""

    def shapes(self, sizes: Sizes) -> tuple[list[Shape], list[Shape]]:
        """Shapes of the Hugging Face tensors and of Megatron's."""

    def to_hf(self, native: Tensors, sizes: Sizes) -> "list[Tensor]":
        """Megatron's tensors -> Hugging Face's."""

    def from_hf(self, hf: Tensors, sizes: Sizes) -> "list[Tensor]":
        """Hugging Face's tensors -> Megatron's."""


@dataclass(frozen=True)
class Same:
    """The same values under another name."""

    shape: str

    def shapes(self, sizes: Sizes) -> tuple[list[Shape], list[Shape]]:
        shape = _shape(self.shape, sizes)
        return [shape], [shape]

    def to_hf(self, native: Tensors, sizes: Sizes) -> "list[Tensor]":
        return list(native)

    def from_hf(self, hf: Tensors, sizes: Sizes) -> "list[Tensor]":
        return list(hf)


@dataclass(frozen=True)
class Rows:
    """One tensor of Hugging Face whose rows are those of several of Megatron's, in order."""

    parts: str
    """Rows of each part."""
    rest: str = ""
    """Further axes."""

    def shapes(self, sizes: Sizes) -> tuple[list[Shape], list[Shape]]:
        parts, rest = _shape(self.parts, sizes), _shape(self.rest, sizes)
        return [(sum(parts), *rest)], [(part, *rest) for part in parts]

    def to_hf(self, native: Tensors, sizes: Sizes) -> "list[Tensor]":
        import torch

        return [torch.cat(list(native))]

    def from_hf(self, hf: Tensors, sizes: Sizes) -> "list[Tensor]":
        return list(hf[0].split(list(_shape(self.parts, sizes))))


@dataclass(frozen=True)
class QueryGroups:
    """Hugging Face has q, k and v apart. Megatron's linear_qkv has, for each key/value head in
    turn, the rows of its query heads, of its key and of its value."""

    def shapes(self, sizes: Sizes) -> tuple[list[Shape], list[Shape]]:
        d, q, kv = sizes["d"], sizes["Q"], sizes["G"] * sizes["h"]
        return [(q, d), (kv, d), (kv, d)], [(q + 2 * kv, d)]

    def to_hf(self, native: Tensors, sizes: Sizes) -> "list[Tensor]":
        d, groups, head = sizes["d"], sizes["G"], sizes["h"]
        grouped = native[0].view(groups, -1, d)
        parts = grouped.split([sizes["Q"] // groups, head, head], dim=1)
        return [part.reshape(-1, d) for part in parts]

    def from_hf(self, hf: Tensors, sizes: Sizes) -> "list[Tensor]":
        import torch

        d, groups = sizes["d"], sizes["G"]
        return [torch.cat([x.view(groups, -1, d) for x in hf], dim=1).view(-1, d)]


@dataclass(frozen=True)
class Row:
    """One line of the table. `{a,b}` in a name stands for two names; `{expert}` for one name an
    expert on Hugging Face's side, which are slices of one stacked tensor on Megatron's."""

    hf: str
    native: str
    transform: Transform
    fp32: bool = False
    """Hugging Face's tensor is FP32, whatever the others are."""


LAYERS: dict[str, tuple[Row, ...]] = {
    "M": (
        Row("norm.weight", "mixer.in_proj.layer_norm_weight", Same("d")),
        Row("mixer.in_proj.weight", "mixer.in_proj.weight.{z,x,B,C,dt}", Rows("I I GN GN H", "d")),
        Row("mixer.conv1d.weight", "mixer.conv1d.weight.{x,B,C}", Rows("I GN GN", "1 K")),
        Row("mixer.conv1d.bias", "mixer.conv1d.bias.{x,B,C}", Rows("I GN GN")),
        Row("mixer.dt_bias", "mixer.dt_bias", Same("H"), fp32=True),
        Row("mixer.A_log", "mixer.A_log", Same("H"), fp32=True),
        Row("mixer.D", "mixer.D", Same("H"), fp32=True),
        Row("mixer.norm.weight", "mixer.norm.weight", Same("I")),
        Row("mixer.out_proj.weight", "mixer.out_proj.weight", Same("d I")),
    ),
    "*": (
        Row("norm.weight", "self_attention.linear_qkv.layer_norm_weight", Same("d")),
        Row("mixer.{q,k,v}_proj.weight", "self_attention.linear_qkv.weight", QueryGroups()),
        Row("mixer.o_proj.weight", "self_attention.linear_proj.weight", Same("d Q")),
    ),
    "E": (
        Row("norm.weight", "pre_mlp_layernorm.weight", Same("d")),
        Row("mixer.gate.weight", "mlp.router.weight", Same("E d")),
        Row("mixer.gate.e_score_correction_bias", "mlp.router.expert_bias", Same("E"), fp32=True),
        Row(
            "mixer.experts.{expert}.up_proj.weight",
            "mlp.experts.experts.linear_fc1.weight",
            Same("m l"),
        ),
        Row(
            "mixer.experts.{expert}.down_proj.weight",
            "mlp.experts.experts.linear_fc2.weight",
            Same("l m"),
        ),
        Row(
            "mixer.shared_experts.up_proj.weight",
            "mlp.shared_experts.linear_fc1.weight",
            Same("s d"),
        ),
        Row(
            "mixer.shared_experts.down_proj.weight",
            "mlp.shared_experts.linear_fc2.weight",
            Same("d s"),
        ),
    ),
    "-": (
        Row("norm.weight", "mlp.linear_fc1.layer_norm_weight", Same("d")),
        Row("mixer.up_proj.weight", "mlp.linear_fc1.weight", Same("f d")),
        Row("mixer.down_proj.weight", "mlp.linear_fc2.weight", Same("d f")),
    ),
}
"""Layer symbol -> its tensors."""
_LATENT = (
    Row("mixer.fc1_latent_proj.weight", "mlp.fc1_latent_proj.weight", Same("l d")),
    Row("mixer.fc2_latent_proj.weight", "mlp.fc2_latent_proj.weight", Same("d l")),
)
"""Also in E layers, with LatentMoE."""

_ENDS = (
    Row("backbone.embeddings.weight", "embedding.word_embeddings.weight", Same("V d")),
    Row("backbone.norm_f.weight", "decoder.final_norm.weight", Same("d")),
    Row("lm_head.weight", "output_layer.weight", Same("V d")),
)
_MTP_FIRST = (
    Row("enorm.weight", "enorm.weight", Same("d")),
    Row("hnorm.weight", "hnorm.weight", Same("d")),
    Row("eh_proj.weight", "eh_proj.weight", Same("d 2d")),
)
"""Of one multi-token-prediction depth; Hugging Face keeps them with its first inner layer."""
_MTP_LAST = (Row("final_layernorm.weight", "final_layernorm.weight", Same("d")),)
"""The same, with its last inner layer."""


@dataclass(frozen=True)
class Pair:
    """Tensors of both sides that hold the same values."""

    hf: tuple[Spec, ...]
    native: tuple[Spec, ...]
    row: Row
    sizes: Sizes

    def to_hf(self, native: Tensors) -> "list[Tensor]":
        """Megatron's tensors -> Hugging Face's."""
        return self.row.transform.to_hf(native, self.sizes)

    def from_hf(self, hf: Tensors) -> "list[Tensor]":
        """Hugging Face's tensors -> Megatron's."""
        return self.row.transform.from_hf(hf, self.sizes)


def pairs(model: ModelConfig) -> list[Pair]:
    """The table written out for a model, in the order of the forward pass."""
    sizes = _sizes(model)
    pattern = parse_pattern(model.hybrid_layer_pattern)
    rows = dict(LAYERS)
    if model.moe_latent_size:
        rows["E"] += _LATENT
    embedding, norm, head = _ENDS
    found = list(_written((embedding,), "", "", sizes))
    for i, symbol in enumerate(pattern.main):
        found += _written(rows[symbol], f"backbone.layers.{i}.", f"decoder.layers.{i}.", sizes)
    found += _written((norm, head), "", "", sizes)
    last = len(pattern.mtp) - 1
    for depth in range(mtp_blocks(model)):
        native = f"mtp.layers.{depth}."
        for j, symbol in enumerate(pattern.mtp):
            hf = f"mtp.layers.{depth * len(pattern.mtp) + j}."
            if j == 0:
                found += _written(_MTP_FIRST, hf, native, sizes)
            found += _written(rows[symbol], hf, f"{native}mtp_model_layer.layers.{j}.", sizes)
            if j == last:
                found += _written(_MTP_LAST, hf, native, sizes)
    return found


def mtp_blocks(model: ModelConfig) -> int:
    """Multi-token-prediction blocks with weights of their own."""
    depths = parse_pattern(model.hybrid_layer_pattern).mtp_depths
    return min(depths, 1) if model.mtp_use_repeated_layer else depths


def _written(rows: Iterable[Row], hf: str, native: str, sizes: Sizes) -> Iterator[Pair]:
    for row in rows:
        hf_shapes, native_shapes = row.transform.shapes(sizes)
        hf_names = [hf + name for name in _expand(row.hf)]
        native_names = [native + name for name in _expand(row.native)]
        ours = tuple(map(Spec, native_names, native_shapes))
        if "{expert}" not in row.hf:
            yield Pair(tuple(map(Spec, hf_names, hf_shapes)), ours, row, sizes)
            continue
        for i in range(sizes["E"]):
            theirs = Spec(hf_names[0].replace("{expert}", str(i)), hf_shapes[0])
            slice_ = Spec(ours[0].name, ours[0].shape, index=i, of=sizes["E"])
            yield Pair((theirs,), (slice_,), row, sizes)


def _expand(name: str) -> list[str]:
    """`a.{b,c}.d` -> `a.b.d`, `a.c.d`."""
    match = re.search(r"\{(\w+(?:,\w+)+)\}", name)
    if match is None:
        return [name]
    return [name.replace(match[0], part) for part in match[1].split(",")]


def _shape(text: str, sizes: Sizes) -> Shape:
    return tuple(int(word) if word.isdigit() else sizes[word] for word in text.split())


def _sizes(model: ModelConfig) -> Sizes:
    d = model.hidden_size
    return {
        "d": d,
        "2d": 2 * d,
        "V": model.vocab_size,
        "I": model.mamba_num_heads * model.mamba_head_dim,
        "GN": model.mamba_num_groups * model.mamba_state_dim,
        "H": model.mamba_num_heads,
        "K": model.mamba_d_conv,
        "Q": model.num_attention_heads * model.kv_channels,
        "G": model.num_query_groups,
        "h": model.kv_channels,
        "E": model.num_moe_experts or 0,
        "m": model.moe_ffn_hidden_size or 0,
        "l": model.moe_latent_size or d,
        "s": model.moe_shared_expert_intermediate_size or 0,
        "f": model.ffn_hidden_size or 0,
    }
