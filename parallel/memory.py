"""What one rank needs in memory, in plain Python.

Parameters, gradients and optimizer follow from the sizes of Megatron's modules. Activations are
what autograd keeps from the forward to the backward pass, tensor by tensor: counted for the
stand-ins, where they can be seen, and true of Transformer Engine and mamba-ssm but for the
differences `_mamba` and `_attention` name. plan.md compares both with measurements.

Symbols: d hidden_size, I Mamba inner width, G groups, N state, H heads, c width of an attention
head, E experts, k top-k, m width of an expert, l latent width (d without), s shared expert,
V vocabulary, e bytes of an activation; t tokens of a micro batch on a rank (its context share),
u = t / tp where the sequence is split between tensor-parallel ranks.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from parallel.layout import Layout
from recipes.schema import ModelConfig, ParallelConfig, PrecisionConfig, StageConfig


@dataclass(frozen=True)
class Share:
    """The layers one pipeline rank holds."""

    pieces: tuple[str, ...]
    """Symbols of each virtual stage."""
    mtp: str
    """Symbols of one multi-token-prediction depth; empty but on the last rank."""
    mtp_depths: int
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the output head."""
    rank: int

    @property
    def layers(self) -> str:
        """All its decoder layers."""
        return "".join(self.pieces)


class Parameters(NamedTuple):
    """Elements one rank holds, by who shares their gradients."""

    dense: int
    experts: int


@dataclass(frozen=True)
class Job:
    """Everything the size of a rank depends on."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    stage: StageConfig
    layout: Layout
    on_gpu: bool
    """Transformer Engine's and mamba-ssm's kernels instead of the stand-ins."""

    @property
    def element(self) -> int:
        """e, bytes of a parameter and of an activation."""
        return 2 if self.precision.params_dtype == "bf16" else 4

    @property
    def gradient_element(self) -> int:
        """Bytes of an accumulated gradient."""
        return 4 if self.precision.grad_reduce_in_fp32 else self.element

    @property
    def has_mtp(self) -> bool:
        """Whether the model predicts further tokens."""
        return "/" in self.model.hybrid_layer_pattern

    @property
    def tokens(self) -> float:
        """t."""
        return self.stage.micro_batch_size * self.stage.sequence_length / self.layout.cp

    @property
    def split_tokens(self) -> float:
        """u."""
        return self.tokens / (self.layout.tp if self.layout.sequence_parallel else 1)

    @property
    def width(self) -> int:
        """l, or d without a latent."""
        return self.model.moe_latent_size or self.model.hidden_size

    @property
    def expert_rows(self) -> float:
        """Tokens the experts of a rank compute in one layer, when the load is balanced."""
        return self.split_tokens * self.model.moe_router_topk * self.layout.etp

    def recomputes(self, module: str) -> bool:
        """Whether the parallel recipe recomputes a module selectively."""
        return self.parallel.recompute_granularity == "selective" and module in (
            self.parallel.recompute_modules or ("core_attn",)
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass, over all micro batches in flight."""
    buffers: float
    """What else is alive at the peak: the output head's logits, or a dispatcher's tokens."""
    reserved: float
    """On a GPU: CUDA context, NCCL, workspaces of libraries; an assumption."""

    @property
    def total(self) -> float:
        """All of it."""
        kept = self.parameters + self.gradients + self.optimizer
        return kept + self.activations + self.buffers + self.reserved


RESERVED = 5e9
"""Assumed bytes of a GPU that are neither weights nor activations."""


def layer_parameters(job: Job, symbol: str) -> Parameters:
    """Elements of one layer on one rank."""
    model, layout = job.model, job.layout
    d, tp = model.hidden_size, layout.tp
    if symbol == "M":
        inner = model.mamba_num_heads * model.mamba_head_dim
        grouped = 2 * model.mamba_num_groups * model.mamba_state_dim
        rows = 2 * inner + grouped + model.mamba_num_heads
        convolution = (inner + grouped) * (model.mamba_d_conv + 1)
        split = rows * d + convolution + 3 * model.mamba_num_heads + inner + inner * d
        return Parameters(d + split // tp, 0)
    if symbol == "*":
        heads = model.num_attention_heads // tp + 2 * max(1, model.num_query_groups // tp)
        queries = model.num_attention_heads // tp * model.kv_channels
        return Parameters(d + heads * model.kv_channels * d + queries * d, 0)
    if symbol == "-":
        return Parameters(d + 2 * d * (model.ffn_hidden_size or 0) // tp, 0)
    experts, inner = model.num_moe_experts or 0, model.moe_ffn_hidden_size or 0
    shared = 2 * d * (model.moe_shared_expert_intermediate_size or 0) // tp
    latent = 2 * d * model.moe_latent_size if model.moe_latent_size else 0
    own = experts // layout.ep * 2 * job.width * inner // layout.etp
    return Parameters(d + experts * d + latent + shared, own)


def parameters(job: Job, share: Share) -> Parameters:
    """Elements one rank of a pipeline rank's share holds."""
    model, tp = job.model, job.layout.tp
    d = model.hidden_size
    blocks = min(share.mtp_depths, 1) if model.mtp_use_repeated_layer else share.mtp_depths
    symbols = share.layers + share.mtp * blocks
    parts = [layer_parameters(job, symbol) for symbol in symbols]
    outside = blocks * (2 * d * d // tp + 3 * d)
    # Multi-token prediction embeds its tokens on the last rank, which has a copy then.
    outside += (share.first or bool(share.mtp)) * model.vocab_size * d // tp
    outside += share.last * (model.vocab_size * d // tp + d)
    return Parameters(sum(p.dense for p in parts) + outside, sum(p.experts for p in parts))


def layer_activations(job: Job, symbol: str) -> float:
    """Bytes one layer keeps for one micro batch."""
    if job.parallel.recompute_granularity == "full":
        return job.split_tokens * job.model.hidden_size * job.element
    return {"M": _mamba, "*": _attention, "E": _experts, "-": _mlp}[symbol](job)


def _around(job: Job) -> float:
    """A layer's input, and that input normalised."""
    return job.split_tokens * job.model.hidden_size * job.element * 2


def _mamba(job: Job) -> float:
    """in_proj's output (2I + 2GN + H), the scan's output, the gated norm's and out_proj's input
    (3I). The stand-in also keeps the states at chunk starts, which mamba-ssm computes again."""
    model = job.model
    inner = model.mamba_num_heads * model.mamba_head_dim
    grouped = model.mamba_num_groups * model.mamba_state_dim
    elements = 5.0 * inner + 2 * grouped + model.mamba_num_heads
    if not job.on_gpu:
        state, head = model.mamba_state_dim, model.mamba_head_dim
        # model.ssd.chunk_length, which cannot be imported without torch.
        chunk = max(16, 1 << (math.isqrt(state * head).bit_length() - 1))
        elements += state * inner / chunk
    return _around(job) + job.tokens / job.layout.tp * elements * job.element


def _attention(job: Job) -> float:
    """Queries, keys and values, the output, and log-sum-exp in FP32. The stand-in's output
    projection reads a copy of the output."""
    model, tp = job.model, job.layout.tp
    queries = model.num_attention_heads // tp * model.kv_channels
    keys = max(1, model.num_query_groups // tp) * model.kv_channels
    copies = 1 if job.on_gpu or job.recomputes("core_attn") else 2
    elements = queries * (1 + copies) + 2 * keys
    kept = job.tokens * (elements * job.element + 4 * model.num_attention_heads // tp)
    return _around(job) + kept


def _mlp(job: Job) -> float:
    """The inner width before and after its activation."""
    inner = job.model.ffn_hidden_size or 0
    return _around(job) + job.tokens / job.layout.tp * 2 * inner * job.element


def _experts(job: Job) -> float:
    """Dispatched tokens (l), experts before and after their activation (2m), the same of the
    shared expert (2s), the second latent projection's input (l); of routing scores and maps
    (16 E) and indices."""
    model = job.model
    d, experts, k = model.hidden_size, model.num_moe_experts or 0, model.moe_router_topk
    if job.recomputes("moe"):
        # The normalised input is what the layer is computed from again; its input is kept for
        # the norm.
        return _around(job)
    halves = 1 if job.recomputes("moe_act") else 2
    inner = (model.moe_ffn_hidden_size or 0) / job.layout.etp
    kept = job.expert_rows * (job.width + halves * inner) * job.element
    shared = model.moe_shared_expert_intermediate_size or 0
    if not job.recomputes("shared_experts"):
        kept += job.tokens / job.layout.tp * 2 * shared * job.element
    latent = job.width if model.moe_latent_size else 0
    kept += job.split_tokens * (latent * job.element + 16 * experts + 32 * k)
    norm = job.split_tokens * d * job.element if job.recomputes("layernorm") else 0
    return _around(job) - norm + kept


def _head(job: Job) -> float:
    """Probabilities of the tokens, final norm and its input."""
    model = job.model
    logits = job.tokens * (model.vocab_size / job.layout.tp * job.element + 32)
    return logits + _around(job)


def activations(job: Job, share: Share) -> float:
    """Bytes a rank keeps at most: of one micro batch, times those in flight (1F1B, or Megatron's
    interleaved schedule), and the layer that is being recomputed."""
    layout = job.layout
    pieces = [sum(layer_activations(job, s) for s in piece) for piece in share.pieces]
    outside = 0.0
    if share.last:
        mtp = sum(layer_activations(job, s) for s in share.mtp)
        d = job.model.hidden_size
        # eh_proj's input (2d), and the inputs of its two norms.
        joined = 4 * job.split_tokens * d * job.element
        outside = _head(job) + share.mtp_depths * (mtp + joined + _head(job))
    behind, virtual = layout.pp - share.rank - 1, len(share.pieces)
    if virtual > 1:
        flights = min(2 * behind + (virtual - 1) * layout.pp + 1, virtual * layout.num_microbatches)
        kept = flights * sum(pieces) / virtual
    else:
        kept = min(behind + 1, layout.num_microbatches) * pieces[0]
    return kept + outside


def _buffers(job: Job, share: Share) -> float:
    """The larger of: one head's logits while their loss is computed; and in the backward pass the
    gradients inside one layer, as large as what it kept, and what it computes again."""
    plain = replace(job, parallel=ParallelConfig())
    once = max(layer_activations(plain, s) for s in share.layers + share.mtp)
    if job.parallel.recompute_granularity is not None:
        once *= 2
    logits = job.tokens * job.model.vocab_size / job.layout.tp * job.element
    return max(once, logits if share.last else 0.0)


def memory(job: Job, share: Share) -> Memory:
    """What a rank of this share needs at most."""
    own, layout = parameters(job, share), job.layout
    # The distributed optimizer spreads FP32 weights (if the model's are not) and two moments.
    state = 12 if job.element == 2 else 8
    optimizer = state * (own.dense / (layout.dp * layout.cp) + own.experts / layout.edp)
    elements = own.dense + own.experts
    return Memory(
        parameters=elements * job.element,
        gradients=elements * job.gradient_element,
        optimizer=optimizer,
        activations=activations(job, share),
        buffers=_buffers(job, share),
        reserved=RESERVED if job.on_gpu else 0.0,
    )


def shares(stages: tuple[str, ...], mtp: str, mtp_depths: int, pp: int) -> list[Share]:
    """The share of each pipeline rank.

    Args:
        stages: the decoder's symbols cut at every `|`; one part is cut evenly.
    """
    whole = "".join(stages)
    if pp == 1:
        stages = (whole,)
    elif len(stages) == 1:
        size = len(whole) // pp
        stages = tuple(whole[i : i + size] for i in range(0, len(whole), size))
    return [
        Share(
            pieces=stages[rank::pp],
            mtp=mtp if rank == pp - 1 else "",
            mtp_depths=mtp_depths if rank == pp - 1 else 0,
            first=rank == 0,
            last=rank == pp - 1,
            rank=rank,
        )
        for rank in range(pp)
    ]
