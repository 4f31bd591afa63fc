"""What one rank needs in memory, in plain Python.

Parameters, gradients and optimizer follow from the sizes of Megatron's modules; activations from
activations.py, whose symbols these are.
"""

from dataclasses import dataclass
from typing import NamedTuple

from parallel.activations import at_peak
from parallel.job import Job, Share


class Parameters(NamedTuple):
    """Elements one rank holds, by who shares their gradients."""

    dense: int
    experts: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    quantised: float
    """Copies of weights in block formats, which Transformer Engine keeps between micro batches."""
    gradients: float
    optimizer: float
    activations: float
    """This and the next two: parallel.activations.Peak."""
    buffers: float
    communication: float
    reserved: float
    """On a GPU: CUDA context, NCCL, workspaces of libraries; an assumption."""

    @property
    def total(self) -> float:
        """All of it."""
        kept = self.parameters + self.quantised + self.gradients + self.optimizer
        return kept + self.activations + self.buffers + self.communication + self.reserved


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


def memory(job: Job, share: Share, quantised: float = 0.0) -> Memory:
    """What a rank of this share needs at most.

    Args:
        quantised: bytes of its quantised weights.
    """
    own, layout = parameters(job, share), job.layout
    # The distributed optimizer spreads FP32 weights (if the model's are not) and two moments.
    state = 12 if job.element == 2 else 8
    optimizer = state * (own.dense / (layout.dp * layout.cp) + own.experts / layout.edp)
    elements = own.dense + own.experts
    peak = at_peak(job, share)
    return Memory(
        parameters=elements * job.element,
        quantised=quantised,
        gradients=elements * job.gradient_element,
        optimizer=optimizer,
        activations=peak.activations,
        buffers=peak.buffers,
        communication=peak.communication,
        reserved=RESERVED if job.on_gpu else 0.0,
    )
