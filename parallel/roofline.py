"""Time of one optimizer step, from peaks and stated efficiencies.

A rank computes at a share of its GPU's peak, sends at a share of its links', and moves its
activations at a share of its memory's bandwidth. Nothing overlaps but what the recipe says
overlaps; a pipeline idles for (stages - 1) micro batches. It is a rule of thumb to rank layouts
by: plan.md holds it against published figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parallel.activations import computed_again, kept, plain
from parallel.gpus import Gpu
from parallel.job import Job, Share, layers_of_share
from parallel.memory import parameters
from parallel.recompute import Layer
from parallel.traffic import Traffic

EFFICIENCY = {
    "bf16": 0.5,
    "mxfp8": 0.4,
    "nvfp4": 0.37,
    "other": 0.45,
    "link": 0.7,
    "memory": 0.7,
}
"""Shares of peaks: matrix products by format (quantising included); everything else that is
counted in FLOPs (attention, scan, convolution), of the BF16 peak; links; GPU memory. Together with
ACTIVATION_PASSES fitted to the published throughputs in tests/unit/test_plan.py, within 25 %."""

ACTIVATION_PASSES = 19
"""Times an activation that a plain layer keeps moves through GPU memory in a step: norms, casts,
permutations and gradients all read and write it again. A third of that is the forward pass, as of
FLOPs: what is computed again, because it is not kept, moves so often once more."""

OPTIMIZER_BYTES = 32
"""Moved for one element by the optimizer: weight, moments and gradient read, three written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of the slowest pipeline rank."""

    compute: float
    memory: float
    """Norms, activations and permutations, which are bound by bandwidth; the optimizer."""
    communication: float
    """What is not hidden behind computation."""
    bubble: float
    """Waiting for the pipeline to fill and to drain."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.memory + self.communication + self.bubble


def step_time(
    job: Job,
    share: Share,
    gpu: Gpu,
    flops: Mapping[str, float],
    sent: Sequence[Traffic],
) -> StepTime:
    """Predict one step.

    Args:
        flops: format (bf16, mxfp8, nvfp4, other) -> training FLOPs a token of this share's
            layers, over all its tensor-parallel ranks; recomputation included.
        sent: what the rank sends.
    """
    tokens = job.tokens * job.layout.num_microbatches / job.layout.tp
    compute = sum(count * tokens / _speed(gpu, kind) for kind, count in flops.items())
    moved = ACTIVATION_PASSES * _written(job, share) * job.layout.num_microbatches
    own = parameters(job, share)
    states = own.dense / (job.layout.dp * job.layout.cp) + own.experts / job.layout.edp
    memory = (moved + OPTIMIZER_BYTES * states) / (gpu.bandwidth * EFFICIENCY["memory"])
    exposed = 0.0
    hidden = {
        "gradients": job.parallel.overlap_grad_reduce,
        "parameters": job.parallel.overlap_param_gather,
    }
    for x in sent:
        link = gpu.nvlink if x.span <= gpu.domain else gpu.network
        if not hidden.get(x.purpose, False):
            exposed += x.bytes / (link * EFFICIENCY["link"])
    fill = (job.layout.pp - 1) / (job.layout.num_microbatches * len(share.pieces))
    return StepTime(compute, memory, exposed, fill * (compute + memory + exposed))


def _written(job: Job, share: Share) -> float:
    """Bytes of activations of one micro batch, those computed again by a third."""
    layers = layers_of_share(job.parallel, share)
    once = plain(job)
    return sum(kept(once, Layer(x.symbol)) + computed_again(job, x) / 3 for x in layers)


def _speed(gpu: Gpu, kind: str) -> float:
    """FLOP/s of one kind of work. A format the GPU does not have is emulated in BF16."""
    if kind == "other" or getattr(gpu, kind) == gpu.bf16:
        return gpu.bf16 * EFFICIENCY["other" if kind == "other" else "bf16"]
    return float(getattr(gpu, kind)) * EFFICIENCY[kind]
