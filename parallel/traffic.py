"""What one rank sends in one optimizer step, predicted: bytes by the purposes of wire.py.

Conventions are those of wire.md. Load is taken as balanced. What is computed again is sent again.
Symbols as in activations.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.activations import grouped, keys
from parallel.job import Job, Share, layers_of_share
from parallel.memory import parameters
from parallel.recompute import Layer, depth_again, times_again


@dataclass(frozen=True)
class Traffic:
    """Bytes one rank sends for one purpose in one step."""

    purpose: str
    span: int
    """Neighbouring ranks among which it goes on: up to an NVLink domain it stays inside it."""
    bytes: float
    """Sent by one rank."""


def traffic(job: Job, share: Share, domain: int = 1) -> list[Traffic]:
    """Everything but counters and norms (`other`), for one rank of a pipeline rank's share.

    Args:
        domain: GPUs of an NVLink domain.
    """
    layout = job.layout
    layers = layers_of_share(job.parallel, share)
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
        *_expert_traffic(job, layers, domain),
        Traffic("tensor", layout.tp, _tensor(job, share, layers) * steps),
        Traffic("context", layout.tp * layout.cp, _context(job, layers) * steps),
        Traffic("pipeline", layout.world_size, _pipeline(job, share) * steps),
        Traffic("gradients", stage_ranks, (dense + expert) * job.gradient_element),
        Traffic("gradients", layout.tp, _replicated(job, share) * job.gradient_element),
        Traffic("gradients", layout.world_size, _embedding_copy(job, share) * job.gradient_element),
        Traffic("parameters", stage_ranks, gathers * (dense + expert) * job.element),
    ]
    return [x for x in found if x.bytes > 0]


def _expert_traffic(job: Job, layers: Sequence[Layer], domain: int) -> list[Traffic]:
    """Of all MoE layers: k rows of width l a token to the other expert-parallel ranks and back,
    once more backward; probabilities in FP32. The all-gather dispatcher sends every token to
    every rank instead, and reduces in FP32. DeepEP and HybridEP (flex) send a token once to every
    other NVLink domain that has experts of it, and there once to every such rank."""
    layout, k = job.layout, job.model.moe_router_topk
    span = layout.ep * layout.etp
    experts, steps = [layer for layer in layers if layer.symbol == "E"], layout.num_microbatches
    forward = steps * sum(1 + times_again(job.parallel, x, "mlp.experts") for x in experts)
    passes = forward + steps * len(experts)
    if job.parallel.moe_token_dispatcher_type == "flex":
        row = job.split_tokens * (job.width * job.element + 4 * k) * passes
        inside, domains = min(span, domain), -(-span // domain)
        return [
            Traffic(purpose, reach, row * _reached(places, k))
            for purpose in ("expert_dispatch", "expert_combine")
            for reach, places in ((inside, span), (span, domains))
        ]
    if job.parallel.moe_token_dispatcher_type == "allgather":
        others = job.split_tokens * (span - 1)
        rows, table = others * job.width, others * (job.model.num_moe_experts or 0)
        dispatch, combine = rows * job.element, rows * 4
        # Forward also whether a token goes to an expert, in a byte.
        scores = 4 * table * passes + table * forward
    else:
        rows = job.split_tokens * k * (layout.ep - 1) / layout.ep * job.width
        tensor = job.split_tokens * k * (layout.etp - 1) * job.width
        dispatch, combine = (rows + tensor) * job.element, rows * job.element + tensor * 4
        scores = job.split_tokens * k * (layout.ep - 1) / layout.ep * 4 * passes
    return [
        Traffic("expert_dispatch", span, passes * dispatch),
        Traffic("expert_combine", span, passes * combine),
        Traffic("expert_routing", span, scores),
    ]


def _reached(places: int, k: int) -> float:
    """Places but its own where a token's k experts are, on average."""
    return (places - 1) * (1 - (1 - 1 / places) ** k)


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


SPLIT = {
    "M": "mixer.in_proj",
    "*": "self_attention.linear_qkv",
    "E": "mlp.shared_experts",
    "-": "mlp.linear_fc1",
}
"""Where a layer's input meets a column-parallel product."""


def _tensor(job: Job, share: Share, layers: Sequence[Layer]) -> float:
    """Of one micro batch. Each pair of a column- and a row-parallel product gathers its input
    and scatters its output along the sequence, backward the same reversed, and (Transformer
    Engine, Megatron) gathers the input once more for the weight's gradient."""
    layout, model, parallel = job.layout, job.model, job.parallel
    if layout.tp == 1:
        return 0.0
    unit = (layout.tp - 1) / layout.tp * job.tokens * model.hidden_size * job.element
    shared = model.moe_shared_expert_intermediate_size is not None
    pairs = [layer for layer in layers if layer.symbol != "E" or shared]
    total = sum(5.0 + 2 * times_again(parallel, x, SPLIT[x.symbol]) for x in pairs) * unit
    if share.first:
        total += 2 * unit  # the embedding's output and its gradient
    # In chunks the head's input is gathered once, and kept.
    heads = share.last + share.mtp_depths
    total += heads * (2 if parallel.cross_entropy_loss_chunk else 3) * unit
    # Of each depth: eh_proj gathers its input of 2d twice and scatters its gradient, its output is
    # gathered and so is the gradient of that; and the embedding again. Computed again: three.
    return total + share.mtp_depths * (10 + 3 * depth_again(parallel)) * unit


def _context(job: Job, layers: Sequence[Layer]) -> float:
    """Of one micro batch: attention and Mamba, forward (again if recomputed) and backward."""
    if job.layout.cp == 1:
        return 0.0
    attention, mamba = _attention_context(job), _mamba_context(job)
    total = 0.0
    for layer in layers:
        if layer.symbol == "*":
            module, (forward, backward) = "self_attention.core_attention", attention
        elif layer.symbol == "M":
            module, (forward, backward) = "mixer.in_proj", mamba
        else:
            continue
        total += forward * (1 + times_again(job.parallel, layer, module)) + backward
    return total


def _attention_context(job: Job) -> tuple[float, float]:
    """Bytes forward and backward. Keys and values go round or are gathered, backward once more,
    where their gradients go home too: in Transformer Engine cp - 1 hops in the keys' own type, in
    the stand-in FP32, round the whole ring of cp hops. All-to-all exchanges queries, keys and
    outputs for heads."""
    cp, e = job.layout.cp, job.element
    unit = job.tokens * keys(job)
    if job.parallel.cp_comm_type == "a2a":
        queries = job.model.num_attention_heads // job.layout.tp * job.model.kv_channels
        each = (cp - 1) / cp * (unit + job.tokens * 2 * queries) * e
        return each, each
    if job.on_gpu:
        gradients = (cp - 1) * unit * e
    else:
        hops = cp if job.parallel.cp_comm_type == "p2p" else cp - 1
        gradients = hops * unit * max(e, 4)
    return (cp - 1) * unit * e, (cp - 1) * unit * e + gradients


def _mamba_context(job: Job) -> tuple[float, float]:
    """Bytes forward and backward. `heads` exchanges the sequence for heads before the convolution
    and back after the scan; `state` gathers the convolution's reach and, in FP32, states and
    decays of a rank's two segments, whatever their length (model/scan.md)."""
    model, layout, cp = job.model, job.layout, job.layout.cp
    heads = model.mamba_num_heads / layout.tp
    inner = heads * model.mamba_head_dim
    if job.parallel.mamba_context == "heads":
        each = (cp - 1) / cp * job.tokens * (3 * inner + grouped(job) + heads) * job.element
        return each, each
    segments = 2 * (cp - 1) * job.stage.micro_batch_size
    halo = (model.mamba_d_conv - 1) * (inner + grouped(job)) * job.element
    state = 4 * inner * model.mamba_state_dim
    return segments * (halo + state + 4 * heads), segments * (halo + state)


def _pipeline(job: Job, share: Share) -> float:
    """Of one micro batch: activations onward and gradients back, at each of its boundaries."""
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    onward = len(share.pieces) - share.last
    back = len(share.pieces) - share.first
    return (onward + back) * job.split_tokens * job.model.hidden_size * job.element
