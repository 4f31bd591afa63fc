"""`python -m precision.explain experiment=super_120b_a12b precision=nvfp4`: which module runs in
which format, by which rule, and what share of the model that is.

One row for each kind of module and rule; exit code 1 if a weight does not divide into the
blocks of its format. No GPU and no memory needed.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from precision.policy import (
    EVALUATION,
    Decision,
    Policy,
    block_format,
    every_format,
    is_quantized,
    sizes_problem,
)
from recipes.compose import run_cli
from recipes.schema import PrecisionConfig, Recipe
from recipes.tables import table


@dataclass(frozen=True)
class Rest:
    """What no rule speaks of, because Transformer Engine never quantises it."""

    name: str
    parameters: int
    flops: float
    """Forward FLOPs per token."""


def main(recipe: Recipe) -> int:
    """Print the explanation; a recipe that is not valid raises ConfigError before it."""
    # Inside, because nothing else in this package may know the model: this command does.
    from model.gemms import policy_of
    from model.validate import rank_tokens, validate_sizes_apart

    layout = validate_sizes_apart(recipe)
    policy = policy_of(recipe)
    tokens = rank_tokens(recipe, layout)
    print(
        f"{recipe.model.name} in precision {recipe.precision.name}; tensor-parallel ranks: "
        f"{layout.tp}, of experts: {layout.etp}\n"
    )
    print(explain(recipe.precision, policy, _rest(recipe, policy), tokens))
    return int(any(sizes_problem(d, tokens) for _, d in every_format(policy)))


def explain(precision: PrecisionConfig, policy: Policy, rest: Sequence[Rest], tokens: int) -> str:
    """The whole explanation as text.

    Args:
        rest: the parts of the model that are no quantisable module.
        tokens: rows of a rank's activations.
    """
    dtype = precision.params_dtype
    sections = [
        _rules(policy.start),
        _modules(policy.start, dtype, tokens),
        _operands(precision, policy),
        _shares(policy.start, rest, dtype),
        f"validation: {_evaluation(policy, dtype, tokens)}",
    ]
    if policy.switch_tokens < math.inf:
        sections += [
            _switch(policy, dtype),
            _modules(policy.after, dtype, tokens),
            _shares(policy.after, rest, dtype),
        ]
    return "\n\n".join(sections)


def products(name: str, dtype: str) -> tuple[str, str, str]:
    """Formats of the forward, data-gradient and weight-gradient products."""
    if not is_quantized(name):
        return dtype, dtype, dtype
    block = block_format(name)
    return (block if name == block else dtype), block, block


def _rules(decisions: Sequence[Decision]) -> str:
    """The rules that decide something, in the order they are tried."""
    counts = Counter(d.rule.key for d in decisions)
    rules = {d.rule.key: d.rule for d in decisions}
    rows = [("rule", "layers", "module", "format", "modules", "why")]
    for key in sorted(rules, key=_rule_order):
        rule = rules[key]
        rows.append((_short(key), rule.text, rule.module, rule.format, str(counts[key]), rule.why))
    return table(rows, left=(0, 1, 2, 3, 5))


def _short(key: str) -> str:
    return key.removeprefix("precision.")


def _rule_order(key: str) -> tuple[bool, int]:
    """extra_rules come first; each list in its order."""
    group, _, index = key.rstrip("]").partition("[")
    return not group.endswith("extra_rules"), int(index)


def _modules(decisions: Sequence[Decision], dtype: str, tokens: int) -> str:
    """A row for each kind of module, of the decoder and of MTP, and rule."""
    groups: dict[tuple[bool, str, str], list[Decision]] = {}
    for d in decisions:
        groups.setdefault((d.gemm.layer is None, d.gemm.module, d.rule.key), []).append(d)
    parameters = sum(d.gemm.parameters for d in decisions)
    flops = sum(d.gemm.flops for d in decisions)
    rows = [
        (
            "module",
            "layers",
            "rule",
            "forward",
            "data grad",
            "weight grad",
            "weight",
            "sizes",
            "parameters",
            "FLOPs",
        )
    ]
    for (_, module, key), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        gemm = group[0].gemm
        rows.append(
            (
                module,
                _layers(d.gemm.layer for d in group),
                _short(key),
                *products(group[0].format, dtype),
                f"{gemm.rows} x {gemm.columns}",
                sizes_problem(group[0], tokens) or "ok",
                f"{sum(d.gemm.parameters for d in group) / parameters:.1%}",
                f"{sum(d.gemm.flops for d in group) / flops:.1%}",
            )
        )
    note = (
        "layers count over all pipeline stages; a weight is that of one tensor-parallel rank and, "
        "of experts,\nof one; shares are of these modules"
    )
    return table(rows, left=(0, 1, 2, 3, 4, 5, 7)) + "\n" + note


def _layers(layers: Iterable[int | None]) -> str:
    """`40 in 0-87`: the layers of the decoder, or mtp."""
    numbers = [n for n in layers if n is not None]
    if not numbers:
        return "mtp"
    if len(numbers) == 1:
        return str(numbers[0])
    return f"{len(numbers)} in {min(numbers)}-{max(numbers)}"


def _operands(precision: PrecisionConfig, policy: Policy) -> str:
    """How the operands of each product are quantised, for the formats in use."""
    used = {block_format(d.format) for d in (*policy.start, *policy.after)}
    if policy.evaluation is not None:
        used.add(policy.evaluation)
    weight = "1x16" if precision.disable_2d_quantization else "16x16"
    gradient = "nearest" if precision.disable_stochastic_rounding else "stochastic"
    transform = "" if precision.disable_rht else ", Hadamard"
    rows = [("format", "product", "first operand", "second operand")]
    if "nvfp4" in used:
        rows += [
            ("nvfp4", "forward", "x 1x16, nearest", f"W {weight}, nearest"),
            ("", "data grad", f"dy 1x16, {gradient}", f"W {weight}, nearest"),
            ("", "weight grad", f"dy 16x1{transform}, {gradient}", f"x 16x1{transform}, nearest"),
        ]
    if "mxfp8" in used:
        rows += [
            ("mxfp8", "forward", "x 1x32, nearest", "W 1x32, nearest"),
            ("", "data grad", "dy 1x32, nearest", "W 32x1, nearest"),
            ("", "weight grad", "dy 32x1, nearest", "x 32x1, nearest"),
        ]
    dtype = precision.params_dtype
    rows.append((dtype, "all", "as it is", "as it is"))
    note = (
        "sizes are those of a block with one scale: [rows, columns] of x [tokens, in], "
        "dy [tokens, out], W [out, in]"
    )
    return table(rows, left=(0, 1, 2, 3)) + "\n" + note


def _shares(decisions: Sequence[Decision], rest: Sequence[Rest], dtype: str) -> str:
    """Parameters, and FLOPs of a training token, by format."""
    parameters: Counter[str] = Counter()
    flops: dict[str, float] = defaultdict(float)
    for d in decisions:
        forward, *gradients = products(d.format, dtype)
        # A weight whose forward product is not quantised is kept as it is.
        parameters[forward] += d.gemm.parameters
        for name in (forward, *gradients):
            flops[name] += d.gemm.flops
    lines = [(name, parameters[name], flops[name]) for name in ("nvfp4", "mxfp8", dtype)]
    lines = [line for line in lines if line[1] or line[2]]
    lines += [(part.name, part.parameters, 3 * part.flops) for part in rest]
    all_parameters, all_flops = sum(x[1] for x in lines), sum(x[2] for x in lines)
    rows = [("format", "parameters", "share", "GFLOP/token", "share")]
    rows += [
        (
            name,
            f"{count:,}",
            f"{count / all_parameters:.2%}",
            f"{cost / 1e9:,.3f}",
            f"{cost / all_flops:.2%}",
        )
        for name, count, cost in [*lines, ("total", all_parameters, all_flops)]
    ]
    return table(rows, left=(0,))


def _evaluation(policy: Policy, dtype: str, tokens: int) -> str:
    if policy.evaluation is None:
        return "as in training"
    lines = [f"quantised modules run in {products(policy.evaluation, dtype)[0]}"]
    used = [d for key, d in every_format(policy) if key == EVALUATION]
    # A module of each kind has the sizes of all.
    problems = {(d.gemm.module, sizes_problem(d, tokens)) for d in used}
    lines += [f"  {module}: {problem}" for module, problem in sorted(problems) if problem]
    return "\n".join(lines)


def _switch(policy: Policy, dtype: str) -> str:
    """What changes, and when."""
    changes = Counter(
        (products(a.format, dtype), products(b.format, dtype))
        for a, b in zip(policy.start, policy.after, strict=True)
        if a.format != b.format
    )
    lines = [f"from {policy.switch_tokens:,.0f} tokens on (forward / data grad / weight grad):"]
    lines += [
        f"  {count} modules from {' / '.join(old)} to {' / '.join(new)}"
        for (old, new), count in changes.items()
    ]
    return "\n".join(lines)


def _rest(recipe: Recipe, policy: Policy) -> tuple[Rest, ...]:
    """The router, and everything else that is never quantised."""
    import warnings

    from model.backends import install_backends
    from model.counts import count_parameters, forward_flops, layer_flops
    from model.pattern import parse_pattern

    model = recipe.model
    pattern, length = parse_pattern(model.hybrid_layer_pattern), recipe.stage.sequence_length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in model/describe.py
        install_backends(recipe.device)
        # No format changes a count.
        counts = count_parameters(replace(recipe, precision=PrecisionConfig(name="bf16")))
    routers = pattern.main.count("E") + pattern.mtp_depths * pattern.mtp.count("E")
    router = Rest(
        f"router, {model.moe_router_dtype or recipe.precision.params_dtype}",
        counts.modules.get("mlp.router", 0),
        routers * layer_flops(model, "E", length)["mlp.router"] if routers else 0.0,
    )
    gemms = [d.gemm for d in policy.start]
    other = Rest(
        f"never quantised, {recipe.precision.params_dtype}",
        counts.total - router.parameters - sum(g.parameters for g in gemms),
        sum(forward_flops(model, length).values()) - router.flops - sum(g.flops for g in gemms),
    )
    return (router, other) if routers else (other,)


if __name__ == "__main__":
    run_cli(main, "precision.explain")
