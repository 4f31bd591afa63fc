"""How many parameters a recipe has, and how many FLOPs a token costs.

Parameters are counted on the real Megatron model, built on the meta device, so they are those
of a checkpoint: router bias buffers included, a repeated multi-token-prediction (MTP) block
once. FLOPs are computed in plain Python from the recipe, in two steps: `layer_flops` for one
layer and `forward_flops` for the model.

What is counted is the work the model defines, whatever the kernels do with it: a
multiply-add is 2 FLOPs, every token uses exactly top-k experts, a causal query meets the keys
before it and itself, and recomputed activations count nothing. The state-space scan is
counted as its recurrence. Norms, activations, gates, softmax and the router's top-k are left
out: they are below 1 % and bound by memory, not by arithmetic.

Symbols: d hidden_size, I = mamba_num_heads * mamba_head_dim, G mamba_num_groups,
N mamba_state_dim, H mamba_num_heads, S sequence_length, V vocab_size, E experts, k top-k,
m width of an expert, l latent width (d without LatentMoE), s width of the shared expert.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.pattern import parse_pattern
from recipes.schema import ModelConfig, ParallelConfig, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

_LAYER = re.compile(
    r"(?:decoder|mtp\.layers\.(?P<block>\d+)\.mtp_model_layer)\.layers\.(?P<layer>\d+)\.(?P<rest>.+)"
)
"""Megatron's name of a parameter inside a layer, of the decoder or of an MTP block."""

EXPERTS = "mlp.experts"
"""Megatron's name of the routed experts inside a layer."""


@dataclass(frozen=True)
class LayerCount:
    """One layer."""

    index: int
    """Position in the decoder, or in its MTP block."""
    symbol: str
    """M, *, E or -."""
    parameters: int
    """Parameters it has."""
    active: int
    """Parameters one token meets: of the routed experts only top-k."""
    flops: float
    """Forward FLOPs per token of one application."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, by place and by kind of module."""

    layers: tuple[LayerCount, ...]
    """The decoder."""
    mtp_layers: tuple[LayerCount, ...]
    """The layers of the MTP block, or of all blocks one after the other if not repeated."""
    mtp_projections: int
    """The rest of the MTP blocks: eh_proj and the norms enorm, hnorm and final_layernorm."""
    embedding: int
    """Input embedding, V * d."""
    final_norm: int
    """Norm before the output head, d."""
    head: int
    """Output head, V * d (never tied)."""
    modules: Mapping[str, int]
    """Megatron's name of a module inside its layer -> parameters over all layers."""

    @property
    def main(self) -> int:
        """Everything but MTP."""
        return self.embedding + sum(x.parameters for x in self.layers) + self.final_norm + self.head

    @property
    def mtp(self) -> int:
        """The MTP blocks, each stored block once."""
        return self.mtp_projections + sum(x.parameters for x in self.mtp_layers)

    @property
    def total(self) -> int:
        """Elements of a checkpoint."""
        return self.main + self.mtp

    @property
    def active(self) -> int:
        """Parameters of the main model one token meets, embedding and head included."""
        return self.embedding + sum(x.active for x in self.layers) + self.final_norm + self.head

    @property
    def active_with_head(self) -> int:
        """`active` without the input embedding, of which a token reads one row."""
        return self.active - self.embedding

    @property
    def active_without_embeddings(self) -> int:
        """`active` without the input embedding and the output head."""
        return self.active - self.embedding - self.head

    @property
    def active_mtp(self) -> int:
        """Parameters of the MTP blocks one token meets in training."""
        return self.mtp_projections + sum(x.active for x in self.mtp_layers)


def layer_flops(model: ModelConfig, symbol: str, sequence_length: int) -> dict[str, float]:
    """Forward FLOPs per token of one layer, by Megatron's module name.

    M   in_proj 2d(2I + 2GN + H), conv 2K(I + 2GN), scan 5IN, out_proj 2Id.
        The scan is the recurrence h = a h + (dt x) B, y = C h of the Mamba-2 paper
        (arXiv 2405.21060, eq. 2): 3 FLOPs a state element to update, 2 to read. The chunked
        algorithm that runs it with chunks of Q does 2QGN + 2QI + 4IN instead, 1.2 times as
        much at Q = N = 128; its surplus is a choice of kernels, not work of the model.
    *   linear_qkv 2d(heads + 2 groups)c, linear_proj 2(heads c)d with head width c; scores and
        weighted values 2 * 2(heads c) for each of the (S + 1) / 2 keys a token sees on average.
    E   router 2dE; latent projections 2dl each; experts k * 2 * 2lm; shared expert 2 * 2ds.
    -   2 * 2d ffn_hidden_size.
    """
    d = model.hidden_size
    if symbol == "M":
        inner = model.mamba_num_heads * model.mamba_head_dim
        groups = model.mamba_num_groups * model.mamba_state_dim
        return {
            "mixer.in_proj": 2.0 * d * (2 * inner + 2 * groups + model.mamba_num_heads),
            "mixer.conv1d": 2.0 * model.mamba_d_conv * (inner + 2 * groups),
            "mixer.scan": 5.0 * inner * model.mamba_state_dim,
            "mixer.out_proj": 2.0 * inner * d,
        }
    if symbol == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys = model.num_query_groups * model.kv_channels
        return {
            "self_attention.linear_qkv": 2.0 * d * (queries + 2 * keys),
            "self_attention.core_attention": 4.0 * queries * (sequence_length + 1) / 2,
            "self_attention.linear_proj": 2.0 * queries * d,
        }
    if symbol == "-":
        assert model.ffn_hidden_size is not None
        return {
            "mlp.linear_fc1": 2.0 * d * model.ffn_hidden_size,
            "mlp.linear_fc2": 2.0 * d * model.ffn_hidden_size,
        }
    assert symbol == "E"
    assert model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    parts = {"mlp.router": 2.0 * d * model.num_moe_experts}
    width = model.moe_latent_size or d
    if model.moe_latent_size:
        parts["mlp.fc1_latent_proj"] = parts["mlp.fc2_latent_proj"] = 2.0 * d * width
    parts[EXPERTS] = model.moe_router_topk * 4.0 * width * model.moe_ffn_hidden_size
    if model.moe_shared_expert_intermediate_size:
        parts["mlp.shared_experts"] = 4.0 * d * model.moe_shared_expert_intermediate_size
    return parts


def forward_flops(model: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Forward FLOPs per token of the whole model: decoder, head (2dV) and, over all depths,
    mtp: at each depth eh_proj (2 * 2d * d), the block's layers and the head again."""
    pattern = parse_pattern(model.hybrid_layer_pattern)

    def layers(symbols: str) -> float:
        return sum(
            count * sum(layer_flops(model, symbol, sequence_length).values())
            for symbol, count in Counter(symbols).items()
        )

    head = 2.0 * model.hidden_size * model.vocab_size
    depth = 4.0 * model.hidden_size**2 + layers(pattern.mtp) + head
    return {
        "decoder": layers(pattern.main),
        "head": head,
        "mtp": pattern.mtp_depths * depth,
    }


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one training token: forward once, backward (the gradients of inputs and of
    weights) twice that. Multiply by tokens per second for model FLOP/s."""
    return 3.0 * sum(forward_flops(model, sequence_length).values())


def published_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one training token as the published throughput tables of Megatron-Bridge count
    them (Megatron-LM's `hybrid_flops`, megatron/training/training.py), to compare with them.

    Unlike `flops_per_token`: the inner width of Mamba is taken as 2d whatever it is (Nano's is
    4096, not 5376: 7 % too much), the scan as 7 FLOPs a state element; convolution, router and
    eh_proj are left out, and S / 2 keys are met instead of (S + 1) / 2.
    """
    pattern = parse_pattern(model.hybrid_layer_pattern)
    symbols = Counter(pattern.main + pattern.mtp * pattern.mtp_depths)
    d, heads = model.hidden_size, model.num_attention_heads
    inner, state = 2 * d, model.mamba_state_dim
    rows = 2 * inner + 2 * model.mamba_num_groups * state + model.mamba_num_heads
    mamba = 2.0 * d * rows + 7.0 * inner * state + 2.0 * inner * d
    keys = d + d * model.num_query_groups / heads + sequence_length / 2
    attention = 4.0 * heads * model.kv_channels * keys
    width = model.moe_latent_size or d
    experts = 4.0 * width * (model.moe_ffn_hidden_size or 0) * model.moe_router_topk
    experts += 4.0 * d * (model.moe_shared_expert_intermediate_size or 0)
    experts += 4.0 * d * width if model.moe_latent_size else 0.0
    mlp = 4.0 * d * (model.ffn_hidden_size or 0)
    costs = {"M": mamba, "*": attention, "E": experts, "-": mlp}
    head = 2.0 * d * model.vocab_size * (1 + pattern.mtp_depths)
    return 3.0 * (head + sum(count * costs[symbol] for symbol, count in symbols.items()))


def count_parameters(recipe: Recipe) -> Counts:
    """Build the recipe's model on the meta device, in one piece whatever its layout, and count.

    `install_backends` must have run, and torch.distributed must be free: a world of one rank
    is set up and torn down.
    """
    from model.hybrid import build_model, transformer_config
    from parallel.device import meta_device
    from parallel.groups import one_rank

    with one_rank(), meta_device():
        config = transformer_config(recipe.model, recipe.precision, ParallelConfig())
        config.init_model_with_meta_device = True
        config.perform_initialization = False
        built = build_model(recipe, config)
    return _count(built, recipe.model, recipe.stage.sequence_length)


def checkpointed(built: "nn.Module") -> Iterator[tuple[str, "Tensor"]]:
    """Parameters and the router biases, which are buffers that a checkpoint holds."""
    yield from built.named_parameters()
    for name, buffer in built.named_buffers():
        if name.endswith("expert_bias"):
            yield name, buffer


def _count(built: "nn.Module", model: ModelConfig, sequence_length: int) -> Counts:
    pattern = parse_pattern(model.hybrid_layer_pattern)
    # (MTP block or None, layer) -> module -> parameters
    layers: dict[tuple[int | None, int], Counter[str]] = {}
    outside: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for name, tensor in checkpointed(built):
        inside = _LAYER.fullmatch(name)
        if inside is None:
            outside[name.split(".")[0] if name.startswith("mtp") else name] += tensor.numel()
            modules[_module(re.sub(r"^mtp\.layers\.\d+", "mtp", name))] += tensor.numel()
            continue
        block = int(inside["block"]) if inside["block"] else None
        module = _module(inside["rest"])
        layers.setdefault((block, int(inside["layer"])), Counter())[module] += tensor.numel()
        modules[module] += tensor.numel()

    def layer(index: int, symbol: str, counts: Counter[str]) -> LayerCount:
        total = counts.total()
        idle = 0
        if symbol == "E":
            experts, used = model.num_moe_experts or 1, model.moe_router_topk
            idle = counts[EXPERTS] * (experts - used) // experts
        flops = sum(layer_flops(model, symbol, sequence_length).values())
        return LayerCount(index, symbol, total, total - idle, flops)

    main = tuple(layer(i, s, layers.pop((None, i))) for i, s in enumerate(pattern.main))
    mtp = tuple(layer(i, pattern.mtp[i], counts) for (_, i), counts in sorted(layers.items()))
    counts = Counts(
        layers=main,
        mtp_layers=mtp,
        mtp_projections=outside.pop("mtp", 0),
        embedding=outside.pop("embedding.word_embeddings.weight"),
        final_norm=outside.pop("decoder.final_norm.weight"),
        head=outside.pop("output_layer.weight"),
        modules=dict(modules),
    )
    assert not outside, f"parameters in no known place: {sorted(outside)}"
    return counts


def _module(name: str) -> str:
    """`mlp.experts.linear_fc1.weight0` -> `mlp.experts`."""
    if name in ("mixer.A_log", "mixer.D", "mixer.dt_bias"):
        return "mixer.scan"
    if name.startswith("mixer.conv1d"):
        return "mixer.conv1d"
    return ".".join(name.split(".")[:-1][:2])
