"""What one rank sends in one optimizer step, predicted: bytes by the purposes of wire.py.

Conventions are those of wire.md. Load is taken as balanced. Symbols as in memory.py.
"""

from dataclasses import dataclass

from parallel.memory import Job, Share, parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes one rank sends for one purpose in one step."""

    purpose: str
    span: int
    """Neighbouring ranks among which it goes on: up to an NVLink domain it stays inside it."""
    bytes: float
    """Sent by one rank."""


def traffic(job: Job, share: Share) -> list[Traffic]:
    """Everything but counters and norms (`other`), for one rank of a pipeline rank's share."""
    layout = job.layout
    symbols = share.layers + share.mtp * share.mtp_depths
    steps = layout.num_microbatches
    own = parameters(job, share)
    dp, edp = layout.dp * layout.cp, layout.edp
    dense, expert = own.dense * (dp - 1) / dp, own.experts * (edp - 1) / edp
    stage_ranks = layout.world_size // layout.pp
    # Where experts have groups of their own, Megatron has an optimizer for them and one for the
    # dense weights, and each of them gathers the weights of both unless the forward pass does.
    two_optimizers = own.experts and (layout.ep > 1 or layout.tp > 1)
    gathers = 2 if two_optimizers and not job.parallel.overlap_param_gather else 1
    found = [
        *_expert_traffic(job, symbols.count("E") * steps),
        Traffic("tensor", layout.tp, _tensor(job, share, symbols) * steps),
        Traffic("context", layout.tp * layout.cp, _context(job, symbols) * steps),
        Traffic("pipeline", layout.world_size, _pipeline(job, share) * steps),
        Traffic("gradients", stage_ranks, (dense + expert) * job.gradient_element),
        Traffic("gradients", layout.tp, _replicated(job, share) * job.gradient_element),
        Traffic("gradients", layout.world_size, _embedding_copy(job, share) * job.gradient_element),
        Traffic("parameters", stage_ranks, gathers * (dense + expert) * job.element),
    ]
    return [x for x in found if x.bytes > 0]


def _expert_traffic(job: Job, passes: int) -> list[Traffic]:
    """Of all MoE layers: k rows of width l a token to the other expert-parallel ranks and back,
    once more backward; probabilities in FP32. The all-gather dispatcher sends every token to
    every rank instead, and reduces in FP32."""
    layout, k = job.layout, job.model.moe_router_topk
    span, again = layout.ep * layout.etp, 1 if job.recomputes("moe") else 0
    if job.parallel.moe_token_dispatcher_type == "allgather":
        rows = job.split_tokens * (span - 1) * job.width
        dispatch, combine = rows * job.element, rows * 4
        scores = 2 * job.split_tokens * (span - 1) * 4 * (job.model.num_moe_experts or 0)
    else:
        rows = job.split_tokens * k * (layout.ep - 1) / layout.ep * job.width
        tensor = job.split_tokens * k * (layout.etp - 1) * job.width
        dispatch, combine = (rows + tensor) * job.element, rows * job.element + tensor * 4
        scores = job.split_tokens * k * (layout.ep - 1) / layout.ep * 4
    return [
        Traffic("expert_dispatch", span, passes * (2 + again) * dispatch),
        Traffic("expert_combine", span, passes * (2 + again) * combine),
        Traffic("expert_routing", span, passes * (2 + again) * scores),
    ]


def _replicated(job: Job, share: Share) -> float:
    """Elements sent to sum the gradients of weights that every tensor-parallel rank has whole,
    each from its part of the sequence: norms, routers, latent projections."""
    model, tp = job.model, job.layout.tp
    d, latent = model.hidden_size, model.moe_latent_size or 0
    blocks = min(share.mtp_depths, 1) if model.mtp_use_repeated_layer else share.mtp_depths
    symbols = share.layers + share.mtp * blocks
    routed = symbols.count("E") * d * ((model.num_moe_experts or 0) + 2 * latent)
    whole = routed + d * (len(symbols) + 3 * blocks + share.last)
    return 2 * (tp - 1) / tp * whole if job.layout.sequence_parallel else 0.0


def _embedding_copy(job: Job, share: Share) -> float:
    """Elements sent to sum the gradients of the embedding's two copies: multi-token prediction
    has one on the last pipeline rank."""
    copied = job.layout.pp > 1 and job.has_mtp and (share.first or share.last)
    return job.model.vocab_size * job.model.hidden_size / job.layout.tp if copied else 0.0


def _tensor(job: Job, share: Share, symbols: str) -> float:
    """Of one micro batch. Each pair of a column- and a row-parallel product gathers its input
    and scatters its output along the sequence, backward the same reversed, and (Transformer
    Engine, Megatron) gathers the input once more for the weight's gradient."""
    layout, model = job.layout, job.model
    if layout.tp == 1:
        return 0.0
    unit = (layout.tp - 1) / layout.tp * job.tokens * model.hidden_size * job.element
    pairs = sum(s != "E" or model.moe_shared_expert_intermediate_size is not None for s in symbols)
    total = 5.0 * pairs * unit
    if share.first:
        total += 2 * unit  # the embedding's output and its gradient
    heads = share.last + share.mtp_depths
    total += heads * 3 * unit
    # Of each depth: eh_proj gathers its input of 2d twice and scatters its gradient, its output is
    # gathered and so is the gradient of that; and the embedding again.
    return total + share.mtp_depths * 10 * unit


def _context(job: Job, symbols: str) -> float:
    """Of one micro batch: a ring of keys and values (twice that and their gradients backward),
    and Mamba's exchange of sequence for heads, both ways."""
    layout, model, cp = job.layout, job.model, job.layout.cp
    if cp == 1:
        return 0.0
    keys = 2 * max(1, model.num_query_groups // layout.tp) * model.kv_channels
    inner = model.mamba_num_heads * model.mamba_head_dim
    grouped = 2 * model.mamba_num_groups * model.mamba_state_dim
    exchanged = (3 * inner + grouped + model.mamba_num_heads) / layout.tp
    attention = symbols.count("*") * 3 * (cp - 1) * keys
    mamba = symbols.count("M") * 2 * (cp - 1) / cp * exchanged
    return job.tokens * job.element * (attention + mamba)


def _pipeline(job: Job, share: Share) -> float:
    """Of one micro batch: activations onward and gradients back, at each of its boundaries."""
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    onward = len(share.pieces) - share.last
    back = len(share.pieces) - share.first
    return (onward + back) * job.split_tokens * job.model.hidden_size * job.element
