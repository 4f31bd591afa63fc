"""From the rules of a recipe to the format of every matrix product of a model.

Plain Python: the model is a list of `Gemm`, the result a `Policy`. How Megatron-Core is made to
follow it is in precision/apply.py, the whole story in policy.md.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from precision.rules import Rule, read_rules
from recipes.errors import ConfigError
from recipes.rules import fail, listed
from recipes.schema import PrecisionConfig

BLOCK = {"nvfp4": 16, "mxfp8": 32}
"""Format -> block both dimensions of a quantised matrix must be multiples of: blocks run along
each of them in turn, and Transformer Engine's quantisers refuse a remainder
(NVFP4Quantizer.is_quantizable, MXFP8Quantizer.is_quantizable)."""

EVALUATION = "precision.evaluation"
"""Key of the format outside training."""

NVFP4_PARTS = ("rht", "stochastic_rounding", "2d_quantization")
"""Parts of the NVFP4 recipe that `disable_...` switches off."""


@dataclass(frozen=True)
class Gemm:
    """One linear module of the model that Transformer Engine can quantise."""

    name: str
    """Megatron's name, with the layer's number in the whole decoder."""
    layer: int | None
    """That number; None inside multi-token prediction."""
    module: str
    """Its name inside the layer: mixer.in_proj, ..., or eh_proj."""
    rows: int
    columns: int
    """The weight [rows, columns] of one tensor-parallel rank; of one expert, if it has many."""
    parameters: int
    """Elements of the weight, over all ranks and experts."""
    flops: float
    """Forward FLOPs per token, over all MTP depths that use it."""


@dataclass(frozen=True)
class Decision:
    """The format of one module, and the rule that chose it."""

    gemm: Gemm
    rule: Rule
    format: str


@dataclass(frozen=True)
class Policy:
    """The format of every module, at any time of a run."""

    start: tuple[Decision, ...]
    """From the first token."""
    after: tuple[Decision, ...]
    """From `switch_tokens` on; the same without a switch."""
    switch_tokens: float
    """Consumed tokens at which the formats change; infinite without a switch."""
    evaluation: str | None
    """Format of quantised modules outside training; None: as in training."""
    disabled: tuple[str, ...] = ()
    """Those of NVFP4_PARTS that are switched off."""

    def at(self, consumed_tokens: float) -> tuple[Decision, ...]:
        """The formats of the step that starts with so many tokens consumed."""
        return self.after if consumed_tokens >= self.switch_tokens else self.start

    def wanted(self, consumed_tokens: float) -> dict[str, str]:
        """Global name of each module -> what it runs in during that step, as `in_full` writes it;
        bf16: not quantised."""
        formats = {d.gemm.name: d.format for d in self.at(consumed_tokens)}
        return {
            name: in_full(f, self.disabled) if is_quantized(f) else "bf16"
            for name, f in formats.items()
        }


def block_format(name: str) -> str:
    """The number format of a rule's format, or of what a module ran in: nvfp4_backward and
    `nvfp4 without rht` -> nvfp4."""
    return name.partition(" ")[0].removesuffix("_backward")


def in_full(name: str, disabled: Sequence[str]) -> str:
    """A format with what is missing of it: `nvfp4 without rht`."""
    return f"{name} without {', '.join(disabled)}" if name == "nvfp4" and disabled else name


def is_quantized(name: str) -> bool:
    """Whether any product of a module in this format has quantised operands."""
    return block_format(name) in BLOCK


def resolve(
    precision: PrecisionConfig, gemms: Sequence[Gemm], num_layers: int, stage_tokens: float
) -> Policy:
    """Decide every module.

    Args:
        gemms: the modules of the whole model, not of one pipeline stage.
        num_layers: layers of the decoder.
        stage_tokens: tokens of the run, of which `switch.at_fraction` is a share.

    Raises:
        ConfigError: a rule that decides for no module and is not optional, a module that no
            rule covers, layers that do not exist, or a quantised format for quantised modules
            where there are none.
    """
    extra = read_rules("precision.extra_rules", precision.extra_rules, num_layers)
    rules = extra + read_rules("precision.rules", precision.rules, num_layers)
    start = _decide("precision.rules", rules, gemms)
    switch = precision.switch
    tokens = switch.at_tokens
    if switch.at_fraction is not None:
        # To a whole token: in binary 0.55 * 204800 is 112640.00000000001, a step later.
        tokens = round(switch.at_fraction * stage_tokens)
    after = start
    if tokens is not None:
        key = "precision.switch.rules"
        if switch.to is not None:
            _check_meets_some("precision.switch.to", switch.to, start)
            after = tuple(replace(d, format=_switched(d.format, switch.to)) for d in start)
        else:
            after = _decide(key, read_rules(key, switch.rules, num_layers), gemms)
    if precision.evaluation is not None:
        _check_meets_some(EVALUATION, precision.evaluation, (*start, *after))
    disabled = tuple(part for part in NVFP4_PARTS if getattr(precision, f"disable_{part}"))
    switch_tokens = math.inf if tokens is None else tokens
    return Policy(start, after, switch_tokens, precision.evaluation, disabled)


def _check_meets_some(key: str, name: str, decisions: Sequence[Decision]) -> None:
    """A format for quantised modules would quantise nothing, unseen, if there are none. That it
    keeps from quantising nothing is harmless: the BF16 arm of a comparison is given it too."""
    if is_quantized(name) and not any(is_quantized(d.format) for d in decisions):
        fail(
            key,
            name,
            "is for quantised modules, and the rules quantise none",
            f"use a precision that does, or precision.switch.rules=[{{format: {name}}}]",
        )


def _switched(name: str, to: str) -> str:
    """The format after `switch.to`; what is not quantised stays so."""
    if not is_quantized(name):
        return name
    return f"{block_format(name)}_backward" if to == "bf16_forward" else to


def _decide(key: str, rules: Sequence[Rule], gemms: Sequence[Gemm]) -> tuple[Decision, ...]:
    decisions = []
    for gemm in gemms:
        rule = next((r for r in rules if r.matches(gemm.layer, gemm.module)), None)
        if rule is None:
            raise ConfigError(
                f"{key} leaves {gemm.name} without a format; end the list with a rule for "
                "everything else, such as {format: bf16}"
            )
        decisions.append(Decision(gemm, rule, rule.format))
    deciding = {d.rule.key for d in decisions}
    for rule in rules:
        if rule.key not in deciding and not rule.optional:
            _explain_idle(rule, rules, gemms)
    return tuple(decisions)


def _explain_idle(rule: Rule, rules: Sequence[Rule], gemms: Sequence[Gemm]) -> None:
    """Raise for a rule that decides nothing, and say why it does not."""
    own = [g for g in gemms if rule.matches(g.layer, g.module)]
    if own:
        takers = {next(r for r in rules if r.matches(g.layer, g.module)).key for g in own}
        raise ConfigError(
            f"{rule} decides for no module, because {listed(sorted(takers))} matches all of its "
            "modules first; move it up, remove it, or set optional: true"
        )
    here = sorted({g.module for g in gemms if g.layer in rule.layers})
    raise ConfigError(
        f"{rule} matches no module, because these layers "
        f"{'have ' + ', '.join(here) if here else 'are not in the model'}; correct it, remove it, "
        "or set optional: true"
    )


def sizes_problem(decision: Decision, tokens: int) -> str | None:
    """Why the products of a module cannot be quantised in the decided format, or None.

    Args:
        tokens: rows of the activations of one micro batch on one rank.
    """
    gemm = decision.gemm
    block = BLOCK.get(block_format(decision.format))
    sizes = {"rows": gemm.rows, "columns": gemm.columns, "tokens": tokens}
    for dimension, size in sizes.items():
        if block and size % block:
            return f"{size} {dimension} % {block} = {size % block}"
    return None


def check_sizes(policy: Policy, tokens: int) -> None:
    """Check that every product can be cut into blocks; `tokens` as in `sizes_problem`.

    Raises:
        ConfigError: the first module whose weight, or whose activations, do not divide.
    """
    for key, decision in every_format(policy):
        if problem := sizes_problem(decision, tokens):
            gemm = decision.gemm
            raise ConfigError(
                f"{key}={decision.format} cannot quantise {gemm.name}, a weight of "
                f"[{gemm.rows}, {gemm.columns}] on a rank that has {tokens} tokens: {problem}; "
                "change that size of the model, the batch or the parallelism, or add "
                f"'precision.extra_rules=[{{module: {gemm.module}, format: bf16}}]'"
            )


def every_format(policy: Policy) -> Iterator[tuple[str, Decision]]:
    """Every format a module ever has, with the key that says so."""
    for decision in policy.start:
        yield f"{decision.rule.key}.format", decision
    for before, decision in zip(policy.start, policy.after, strict=True):
        same_rule = before.rule is decision.rule
        yield "precision.switch.to" if same_rule else f"{decision.rule.key}.format", decision
    if policy.evaluation is not None:
        for decision in (*policy.start, *policy.after):
            if is_quantized(decision.format):
                yield EVALUATION, replace(decision, format=policy.evaluation)
