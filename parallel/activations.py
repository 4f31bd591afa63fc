"""What one rank keeps from the forward to the backward pass, and what is alive beside it.

Tensor by tensor what autograd keeps: counted for the stand-ins, where it can be seen, and true of
Transformer Engine and mamba-ssm but for the differences `_mamba` and `_attention` name. plan.md
compares it with measurements.

Symbols: d hidden_size, I Mamba inner width, G groups, N state, H heads, c width of an attention
head, E experts, k top-k, m width of an expert, l latent width (d without), s shared expert,
V vocabulary, e bytes of an activation; t tokens of a micro batch on a rank (its context share),
u = t / tp where the sequence is split between tensor-parallel ranks.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from parallel.job import Job, Share
from parallel.recompute import Layer, depth_again, layers_of
from recipes.schema import ParallelConfig

SCAN_BLOCK = 1 << 20
"""model.ssd.BLOCK_ELEMENTS, which cannot be imported without torch."""


def plain(job: Job) -> Job:
    """The same with nothing recomputed."""
    parallel = replace(
        job.parallel,
        recompute_granularity=None,
        recompute_modules=None,
        recompute_method=None,
        recompute_num_layers=None,
    )
    return replace(job, parallel=parallel)


def kept(job: Job, layer: Layer) -> float:
    """Bytes one layer keeps for one micro batch."""
    if layer.whole > 1:
        return 0.0  # the unit around it keeps its own input
    if layer.whole:
        return _input(job) / _unit(job.parallel)
    return {"M": _mamba, "*": _attention, "E": _experts, "-": _mlp}[layer.symbol](job)


def computed_again(job: Job, layer: Layer) -> float:
    """Bytes of activations that one micro batch writes a second time."""
    whole = kept(plain(job), Layer(layer.symbol))
    return layer.whole * whole if layer.whole else whole - kept(job, layer)


def _unit(parallel: ParallelConfig) -> int:
    """Layers that are recomputed together."""
    return (parallel.recompute_num_layers or 1) if parallel.recompute_method == "uniform" else 1


def _input(job: Job) -> float:
    return job.split_tokens * job.model.hidden_size * job.element


def _around(job: Job) -> float:
    """A layer's input, and that input normalised."""
    return 2 * _input(job)


def grouped(job: Job) -> float:
    """B and C of a token on a rank, elements. With fewer groups than context-parallel ranks that
    share heads, Megatron repeats them."""
    model, layout = job.model, job.layout
    groups = model.mamba_num_groups / layout.tp
    if layout.cp > 1 and job.parallel.mamba_context == "heads":
        groups = max(groups, layout.cp)
    return 2 * groups * model.mamba_state_dim


def keys(job: Job) -> int:
    """Keys and values of a token on a rank, elements."""
    return 2 * max(1, job.model.num_query_groups // job.layout.tp) * job.model.kv_channels


def _mamba(job: Job) -> float:
    """in_proj's output (2I + 2GN + H), the scan's output, the gated norm's and out_proj's input
    (3I). The stand-in also keeps the states at chunk starts, which mamba-ssm computes again."""
    model, tp = job.model, job.layout.tp
    if job.recomputes("state_mixer"):
        return _input(job)
    inner, heads = model.mamba_num_heads * model.mamba_head_dim / tp, model.mamba_num_heads / tp
    elements = 5 * inner + grouped(job) + heads
    if not job.on_gpu:
        elements += model.mamba_state_dim * inner / _chunk(job)
    states = 0.0
    if job.layout.cp > 1 and job.parallel.mamba_context == "state":
        # Convolved piece by piece: input with halo and output; what incoming states add; steps
        # and decays in FP32; the states themselves. mamba-ssm keeps its output.
        elements += (4 if job.on_gpu else 3) * inner + 2 * grouped(job) + 20 / job.element * heads
        states = 2 * job.stage.micro_batch_size * 4 * inner * model.mamba_state_dim
    return _around(job) + job.tokens * elements * job.element + states


def _chunk(job: Job) -> int:
    """model.ssd.chunk_length, which cannot be imported without torch."""
    size = math.isqrt(job.model.mamba_state_dim * job.model.mamba_head_dim)
    return max(16, 1 << (size.bit_length() - 1))


def _attention(job: Job) -> float:
    """Queries, keys and values, the output, and log-sum-exp in FP32. The stand-in's output
    projection reads a copy of the output."""
    model, tp = job.model, job.layout.tp
    queries = model.num_attention_heads // tp * model.kv_channels
    copies = 1 if job.on_gpu or job.recomputes("core_attn") else 2
    elements = queries * (1 + copies) + keys(job)
    return _around(job) + job.tokens * (
        elements * job.element + 4 * model.num_attention_heads // tp
    )


def _mlp(job: Job) -> float:
    """The inner width before and after its activation."""
    if job.recomputes("mlp"):
        return _around(job)
    inner = job.model.ffn_hidden_size or 0
    return _around(job) + job.tokens / job.layout.tp * 2 * inner * job.element


def _experts(job: Job) -> float:
    """Dispatched tokens (l), experts before and after their activation (2m), the same of the
    shared expert (2s), the second latent projection's input (l); of routing scores and maps
    (16 E) and indices."""
    model = job.model
    d, experts, k = model.hidden_size, model.num_moe_experts or 0, model.moe_router_topk
    # With the norm recomputed too, its output is not kept: the layer is computed from it.
    norm = job.split_tokens * d * job.element if job.recomputes("layernorm") else 0
    if job.recomputes("moe"):
        return _around(job) - norm
    halves = 1 if job.recomputes("moe_act") else 2
    inner = (model.moe_ffn_hidden_size or 0) / job.layout.etp
    own = job.expert_rows * (job.width + halves * inner) * job.element
    shared = model.moe_shared_expert_intermediate_size or 0
    if not job.recomputes("shared_experts"):
        own += job.tokens / job.layout.tp * 2 * shared * job.element
    latent = job.width if model.moe_latent_size else 0
    own += job.split_tokens * (latent * job.element + 16 * experts + 32 * k)
    return _around(job) - norm + own


def _head(job: Job) -> float:
    """Probabilities of the tokens, final norm and its input. In chunks, the head's input and
    losses."""
    if job.parallel.cross_entropy_loss_chunk:
        return _around(job) + job.tokens * (job.model.hidden_size * job.element + 32)
    return _around(job) + job.tokens * (job.model.vocab_size / job.layout.tp * job.element + 32)


class Peak(NamedTuple):
    """Bytes alive when most are."""

    activations: float
    """Kept for the backward pass, over all micro batches in flight."""
    buffers: float
    """One layer's gradients and what it computes again, or the output head's logits."""
    communication: float
    """Copies that are sent and received."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def at_peak(job: Job, share: Share) -> Peak:
    """The worst of: the losses, when everything is kept; a layer of multi-token prediction, when
    the heads are done; a layer of the decoder, when that is done too."""
    boundary = _input(job) if job.layout.pp > 1 else 0.0
    pieces = []
    for i, piece in enumerate(share.pieces):
        layers = sum(kept(job, layer) for layer in layers_of(job.parallel, piece))
        # What a stage sends on is kept until its gradient has come.
        sends = not (share.last and i == len(share.pieces) - 1)
        pieces.append(layers + sends * boundary)
    decoder = _in_flight(job, share.rank, pieces)
    blocks = [layers_of(job.parallel, piece) for piece in share.pieces]
    peaks = [Peak(decoder, *_at_work(job, layer)) for block in blocks for layer in block]
    if share.last:
        block = layers_of(job.parallel, share.mtp, mtp=True)
        # eh_proj's input (2d), and the inputs of its two norms.
        joined = (2 if depth_again(job.parallel) else 4) * _input(job)
        mtp = share.mtp_depths * (sum(kept(job, layer) for layer in block) + joined)
        heads = (1 + share.mtp_depths) * _head(job)
        peaks += [Peak(decoder + mtp, *_at_work(job, layer)) for layer in block]
        peaks.append(Peak(decoder + mtp + heads, _losses(job), 0.0))
    return max(peaks, key=lambda peak: peak.total)


def _in_flight(job: Job, rank: int, pieces: list[float]) -> float:
    """The most that the micro batches in flight keep, each piece so much: 1F1B, or Megatron's
    interleaved schedule, which takes pp micro batches through a piece, then through the next."""
    pp, virtual = job.layout.pp, len(pieces)
    total = virtual * job.layout.num_microbatches
    warmup = pp - rank - 1 if virtual == 1 else 2 * (pp - rank - 1) + (virtual - 1) * pp
    # A round is enough: the schedule repeats.
    order = [pieces[i % (pp * virtual) // pp] for i in range(min(total, warmup + pp * virtual))]
    live = sum(order[:warmup])
    most = live
    for i, forward in enumerate(order[warmup:]):
        live += forward
        most = max(most, live)
        live -= pieces[virtual - 1 - i % (pp * virtual) // pp]
    return most


def _at_work(job: Job, layer: Layer) -> tuple[float, float]:
    """Beside what is kept: of a layer in its backward pass, and of its communication."""
    # What is computed again at one time.
    again = computed_again(job, layer) * (_unit(job.parallel) if layer.whole == 1 else 1)
    return _gradients(job, layer) + again, _communication(job, layer.symbol)


def _gradients(job: Job, layer: Layer) -> float:
    """Inside one layer: as large as what it keeps when nothing is recomputed. The stand-in's scan
    has gradients of its input (2I + 2GN + H), of its output and the convolution again (3I + 2GN),
    and of a block of chunks products of FP32 and copies."""
    if layer.symbol != "M" or job.on_gpu:
        return kept(plain(job), Layer(layer.symbol))
    model, tp = job.model, job.layout.tp
    heads, head = model.mamba_num_heads / tp, model.mamba_head_dim
    elements = 5 * heads * head + 2 * grouped(job) + heads
    block = min(SCAN_BLOCK, job.tokens * heads * max(_chunk(job), head))
    return job.tokens * elements * job.element + 16 * block


def _losses(job: Job) -> float:
    """Of one head: logits. In chunks: logits and their gradients, of the chunk before too, which
    live until they are replaced; and the weight's gradient over all chunks, in FP32 and as it is
    returned."""
    model, chunk = job.model, job.parallel.cross_entropy_loss_chunk
    vocabulary = model.vocab_size / job.layout.tp
    if chunk is None:
        return job.tokens * vocabulary * job.element
    alive = min(4 * chunk, 2 * job.tokens) * vocabulary * job.element
    return alive + vocabulary * model.hidden_size * (4 + job.element)


def _communication(job: Job, symbol: str) -> float:
    """Copies that are sent and received around one layer, in its backward pass.

    Nothing for data parallelism: Megatron's parameters and gradients are views of the buffers that
    are gathered and reduced in place (megatron.core.distributed.param_and_grad_buffer).
    """
    model, layout = job.model, job.layout
    # Transformer Engine gathers the sequence before a column-parallel product.
    gathered = job.tokens * model.hidden_size * job.element if layout.sequence_parallel else 0.0
    # The gradient that came from the next stage, and the one that goes to the previous.
    passed = 2 * _input(job) if layout.pp > 1 else 0.0
    exchange = {"*": _keys_of_others, "M": _sequence_for_heads, "E": _dispatched}.get(symbol)
    return gathered + passed + (exchange(job) if exchange else 0.0)


def _keys_of_others(job: Job) -> float:
    """Keys, values and their gradients. Transformer Engine's ring allocates a buffer for every
    rank's keys forward, four of them backward (context_parallel.AttnFuncWithCPAndKVP2P); gathered
    keys have gradients of their size. The stand-in's gradients are FP32."""
    cp, e = job.layout.cp, job.element
    unit, kind = job.tokens * keys(job), job.parallel.cp_comm_type
    if cp == 1:
        return 0.0
    if kind == "p2p":
        return unit * (max(cp, 4) * e if job.on_gpu else e + 8)
    if kind == "all_gather":
        return unit * cp * (2 * e if job.on_gpu else e + 4)
    queries = job.model.num_attention_heads // job.layout.tp * job.model.kv_channels
    return 2 * (unit + job.tokens * queries) * e


def _sequence_for_heads(job: Job) -> float:
    """A copy of Mamba's input projection that is sent and one that is received; or the summaries
    of all segments and the states before them (model/state_passing.py)."""
    model, layout = job.model, job.layout
    inner = model.mamba_num_heads * model.mamba_head_dim / layout.tp
    if layout.cp == 1:
        return 0.0
    if job.parallel.mamba_context == "state":
        states = 2 * layout.cp * job.stage.micro_batch_size * inner * model.mamba_state_dim
        return 2 * 4 * states
    elements = 2 * inner + grouped(job) + model.mamba_num_heads / layout.tp
    return 2 * job.tokens * elements * job.element


def _dispatched(job: Job) -> float:
    """Tokens sorted by rank to be sent, and those received. The all-gather dispatcher has every
    rank's tokens, their outputs in FP32 and their routing."""
    layout, k = job.layout, job.model.moe_router_topk
    span = layout.ep * layout.etp
    if span == 1:
        return 0.0
    if job.parallel.moe_token_dispatcher_type == "allgather":
        row = job.width * (job.element + 4) + 4 * (job.model.num_moe_experts or 0)
        return job.split_tokens * span * row
    return job.split_tokens * k * (1 + layout.etp) * job.width * job.element
