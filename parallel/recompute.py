"""What the backward pass computes again, as Megatron does it, in plain Python.

`selective` takes parts of layers by name. `full` takes whole layers (megatron.core.recompute):
`uniform` all of them, in units of recompute_num_layers of which only the input is kept; `block` the
first recompute_num_layers of every stage, one by one. In multi-token prediction `uniform` takes a
whole depth and, computing that again, its layers once more, each a unit; `block` takes its first
layers like those of any stage.
"""

from typing import NamedTuple

from recipes.schema import ParallelConfig

PARTS = {
    "core_attn": ("*", "self_attention.core_attention"),
    "mlp": ("-", "mlp."),
    "moe": ("E", "mlp."),
    "shared_experts": ("E", "mlp.shared_experts"),
    "state_mixer": ("M", "mixer."),
}
"""What of `recompute_modules` costs FLOPs: kind of layer, beginning of its modules' names.
state_mixer is not one of them: model.context_mixers recomputes it with any selection."""


class Layer(NamedTuple):
    """A layer of a stage or of a multi-token-prediction depth."""

    symbol: str
    whole: int = 0
    """Times all of it is computed again."""


def layers_of(parallel: ParallelConfig, symbols: str, mtp: bool = False) -> list[Layer]:
    """The layers of a stage, or of a depth of multi-token prediction."""
    if parallel.recompute_granularity != "full":
        return [Layer(symbol) for symbol in symbols]
    if parallel.recompute_method == "uniform":
        return [Layer(symbol, 2 if mtp else 1) for symbol in symbols]
    count = parallel.recompute_num_layers or 0
    return [Layer(symbol, int(i < count)) for i, symbol in enumerate(symbols)]


def depth_again(parallel: ParallelConfig) -> int:
    """Times what is around the layers of a multi-token-prediction depth is computed again."""
    whole = parallel.recompute_granularity == "full" and parallel.recompute_method == "uniform"
    return int(whole)


def selected(parallel: ParallelConfig) -> set[str]:
    """What is recomputed selectively: modules of the recipe, and state_mixer."""
    if parallel.recompute_granularity != "selective":
        return set()
    modules = set(parallel.recompute_modules or ("core_attn",))
    state = parallel.mamba_context == "state" and parallel.context_parallel_size > 1
    return modules | ({"state_mixer"} if state else set())


def times_again(parallel: ParallelConfig, layer: Layer, module: str) -> int:
    """Forward passes of a module beyond the first. A part inside a part is computed twice more.

    Args:
        module: Megatron's name inside the layer, such as mlp.experts.
    """
    parts = [PARTS[name] for name in selected(parallel) & PARTS.keys()]
    within = sum(symbol == layer.symbol and module.startswith(name) for symbol, name in parts)
    return layer.whole + within
