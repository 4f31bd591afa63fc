"""What a plan is made for: a recipe in a layout, and the part of it one pipeline rank has."""

from dataclasses import dataclass

from parallel.layout import Layout
from parallel.recompute import Layer, layers_of, selected
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
        return module in selected(self.parallel)


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


def layers_of_share(parallel: ParallelConfig, share: Share) -> list[Layer]:
    """The layers a micro batch passes on a rank, those of every prediction depth included."""
    layers = [layer for piece in share.pieces for layer in layers_of(parallel, piece)]
    return layers + layers_of(parallel, share.mtp, mtp=True) * share.mtp_depths
