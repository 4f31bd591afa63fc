"""`python -m model.describe experiment=super_120b_a12b`: what a recipe builds, layer by layer.

Prints the layout, the sizes derived from the recipe, every layer with its parameters and
FLOPs, and the totals. Builds the real model on the meta device: no GPU and no memory needed.
"""

import math
import warnings
from collections.abc import Sequence

from model.backends import install_backends
from model.counts import Counts, LayerCount, count_parameters, forward_flops, layer_flops
from model.hybrid import init_method_std
from model.pattern import LAYERS, Pattern, parse_pattern
from model.validate import validate_recipe
from parallel.layout import Layout
from recipes.compose import run_cli
from recipes.schema import ModelConfig, Recipe
from recipes.tables import table


def main(recipe: Recipe) -> int:
    """Print the description; a recipe that is not valid raises ConfigError before it."""
    layout = validate_recipe(recipe)
    with warnings.catch_warnings():
        # Megatron warns at import about optional libraries; the table of `python -m train`
        # says what runs on what.
        warnings.simplefilter("ignore")
        install_backends(recipe.device)
        counts = count_parameters(recipe)
    print(describe(recipe, layout, counts))
    return 0


def describe(recipe: Recipe, layout: Layout, counts: Counts) -> str:
    """The whole description as text."""
    model, length = recipe.model, recipe.stage.sequence_length
    pattern = parse_pattern(model.hybrid_layer_pattern)
    sections = [
        "\n".join(
            [
                _title(model, pattern),
                f"pattern   {model.hybrid_layer_pattern}",
                f"layout    {layout}",
                *_derived(model, pattern),
            ]
        ),
        _layer_table(counts.layers),
    ]
    if pattern.mtp_depths:
        sections.append(_mtp(model, pattern, counts))
    sections += [_modules(model, pattern, counts, length), _totals(model, counts, length)]
    return "\n\n".join(sections)


def _title(model: ModelConfig, pattern: Pattern) -> str:
    kinds = [
        f"{pattern.main.count(symbol)} {name}"
        for symbol, name in LAYERS.items()
        if symbol in pattern.main
    ]
    title = f"{model.name}: {pattern.num_layers} layers ({', '.join(kinds)})"
    if pattern.mtp_depths:
        blocks = "one shared block" if model.mtp_use_repeated_layer else "a block each"
        title += f", {pattern.mtp_depths} multi-token-prediction depths with {blocks}"
    return title


def _derived(model: ModelConfig, pattern: Pattern) -> list[str]:
    """Sizes that follow from the recipe, one line a layer kind in use."""
    symbols = pattern.main + pattern.mtp
    std = init_method_std(model)
    lines = [
        f"width     {model.hidden_size}, vocabulary {model.vocab_size}, initial std {std:.4g}, "
        f"output projections {std / math.sqrt(pattern.num_layers):.3g}"
    ]
    if "M" in symbols:
        heads, groups = model.mamba_num_heads, model.mamba_num_groups
        inner, state = heads * model.mamba_head_dim, model.mamba_state_dim
        lines.append(
            f"Mamba-2   inner width {inner} = {heads} heads * {model.mamba_head_dim}, "
            f"{groups} groups of {heads // groups} heads (gated norm over {inner // groups}), "
            f"state {state} a channel, {inner + 2 * groups * state} convolved channels"
        )
    if "*" in symbols:
        heads, groups, width = model.num_attention_heads, model.num_query_groups, model.kv_channels
        lines.append(
            f"attention {heads} query heads * {width} = {heads * width}, {groups} key/value heads "
            f"of {heads // groups} queries each, no position embedding"
        )
    if "E" in symbols:
        latent = model.moe_latent_size
        at = f"latent width {latent}" if latent else f"full width {model.hidden_size}"
        lines.append(
            f"MoE       top {model.moe_router_topk} of {model.num_moe_experts} experts of "
            f"{model.moe_ffn_hidden_size} at {at}, shared expert "
            f"{model.moe_shared_expert_intermediate_size or 'none'}"
        )
    if "-" in symbols:
        lines.append(f"MLP       inner width {model.ffn_hidden_size}")
    return lines


def _layer_table(layers: Sequence[LayerCount]) -> str:
    rows = [("layer", "", "kind", "parameters", "active", "MFLOP/token")]
    rows += [
        (
            str(x.index),
            x.symbol,
            LAYERS[x.symbol],
            f"{x.parameters:,}",
            f"{x.active:,}",
            f"{x.flops / 1e6:,.3f}",
        )
        for x in layers
    ]
    return table(rows, left=(1, 2))


def _mtp(model: ModelConfig, pattern: Pattern, counts: Counts) -> str:
    blocks = len(counts.mtp_layers) // len(pattern.mtp)
    times = pattern.mtp_depths // blocks
    run = f"1 block, run {times} times" if blocks == 1 else f"{blocks} blocks, run once each"
    head = (
        f"multi-token prediction: {run}, the shared output head after each; "
        f"{counts.mtp_projections:,} parameters in eh_proj and norms"
    )
    return head + "\n" + _layer_table(counts.mtp_layers)


def _modules(model: ModelConfig, pattern: Pattern, counts: Counts, length: int) -> str:
    """Where parameters and FLOPs are: modules of all layers together, MTP depths included."""
    flops: dict[str, float] = {}
    for symbols, times in ((pattern.main, 1), (pattern.mtp, pattern.mtp_depths)):
        for symbol in symbols:
            for name, cost in layer_flops(model, symbol, length).items():
                flops[name] = flops.get(name, 0.0) + times * cost
    total = sum(forward_flops(model, length).values())
    head = 2.0 * model.hidden_size * model.vocab_size
    flops["output_layer"] = head * (1 + pattern.mtp_depths)
    if pattern.mtp_depths:
        flops["mtp.eh_proj"] = 4.0 * model.hidden_size**2 * pattern.mtp_depths
    rows = [("module", "parameters", "share", "MFLOP/token", "share")]
    for name in [*counts.modules, *(n for n in flops if n not in counts.modules)]:
        parameters, cost = counts.modules.get(name, 0), flops.get(name, 0.0)
        rows.append(
            (
                name,
                f"{parameters:,}",
                f"{parameters / counts.total:.1%}",
                f"{cost / 1e6:,.3f}",
                f"{cost / total:.1%}",
            )
        )
    return table(rows, left=(0,))


def _totals(model: ModelConfig, counts: Counts, length: int) -> str:
    forward = forward_flops(model, length)
    once = sum(forward.values())
    rows = [
        ("parameters of a checkpoint", f"{counts.total:,}"),
        ("  main model", f"{counts.main:,}"),
        ("  multi-token prediction", f"{counts.mtp:,}"),
        ("active per token, main model", f"{counts.active:,}"),
        ("  without the input embedding", f"{counts.active_with_head:,}"),
        ("  without embedding and head", f"{counts.active_without_embeddings:,}"),
        ("active per token, multi-token prediction", f"{counts.active_mtp:,}"),
        (f"GFLOP per token, forward, sequences of {length}", f"{once / 1e9:,.4f}"),
        *((f"  {name}", f"{cost / 1e9:,.4f}") for name, cost in forward.items()),
        ("GFLOP per token, training (3 x forward)", f"{3 * once / 1e9:,.4f}"),
    ]
    return table(rows, left=(0,))


if __name__ == "__main__":
    run_cli(main, "model.describe")
