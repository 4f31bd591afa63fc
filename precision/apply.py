"""Makes Megatron-Core and Transformer Engine follow a policy, and checks that they did.

Every linear module gets a quantization recipe of its own that overrides whatever context
Megatron opens around it, so what a module computes in depends on the policy alone: not on its
pipeline stage, nor on Megatron's own rules for first, last and MTP layers (policy.md).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precision.factories import check_library
from precision.policy import NVFP4_PARTS, Policy, block_format, in_full, is_quantized
from recipes.errors import PrecisionError
from recipes.schema import PrecisionConfig

if TYPE_CHECKING:
    from torch import nn

SHOWN = 8
"""Modules listed in a message before it says how many more there are."""


def transformer_fields(
    precision: PrecisionConfig, has_experts: bool, moe_token_dispatcher_type: str
) -> dict[str, Any]:
    """Fields of TransformerConfig that let modules quantise; none if no rule asks for it.

    Megatron's own context (fp4 or fp8, never both) decides for no module here, but other parts
    ask for it: the padding of experts' tokens, recomputation, and the reuse of quantised weights
    between micro batches. fp4 pads to 128 rows, which MXFP8 accepts too.
    """
    names = block_formats(precision)
    if "nvfp4" in names:
        fields: dict[str, Any] = {"fp4": "e2m1", "fp4_recipe": "nvfp4"}
    elif "mxfp8" in names:
        fields = {"fp8": "e4m3", "fp8_recipe": "mxfp8"}
    else:
        return {}
    # The router pads with tokens of weight zero, which costs no copy; under allgather Megatron
    # refuses that and pads with zeros itself.
    padded = has_experts and moe_token_dispatcher_type != "allgather"
    return fields | {"moe_router_padding_for_quantization": padded}


PLAIN = {
    "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "0",
    "NVTE_NVFP4_4OVER6": "none",
    "NVTE_NVFP4_4OVER6_E4M3_USE_256": "all",
    "NVTE_NVFP4_4OVER6_ERR_MODE": "MAE",
}
"""Variants of NVFP4BlockScaling that no key asks for, at the library's defaults."""

VARIANTS = ("backward_override", "row_scaled_activation", "nvfp4_4over6")
"""Fields of the library's recipes that make another format of one."""

OVERRIDE = "NVTE_BACKWARD_OVERRIDE"
"""Gradients that are not quantised, whatever the recipe says; off is the variable's absence."""


def set_environment(precision: PrecisionConfig) -> None:
    """Give Transformer Engine's recipes the switches of ours, before the library is imported, and
    let nothing that was left in the environment change a run."""
    os.environ.update(environment(precision))
    os.environ.pop(OVERRIDE, None)


def environment(precision: PrecisionConfig) -> dict[str, str]:
    """Environment variables of the recipe: Megatron makes the library's without arguments, so
    their switches can be reached in no other way."""
    switches = {
        f"NVTE_NVFP4_DISABLE_{part.upper()}": str(int(getattr(precision, f"disable_{part}")))
        for part in NVFP4_PARTS
    }
    return PLAIN | switches


def apply_policy(chunks: Sequence["nn.Module"], policy: Policy, consumed_tokens: float = 0) -> None:
    """Give every linear module of the model chunks its format for the step that starts with so
    many tokens consumed. Depends on nothing else, so it is right after a resume or a rollback.

    Args:
        chunks: this rank's parts of the model, wrapped by Megatron or not.

    Raises:
        ConfigError: Transformer Engine lacks what a format needs, now or after the switch.
    """
    from megatron.core.quantization.quant_config import RecipeConfig
    from megatron.core.quantization.utils import get_quant_config_or_none
    from megatron.core.utils import unwrap_model

    for decision in (*policy.start, *policy.after):
        if decision.format != block_format(decision.format):
            check_library(f"format {decision.format} of {decision.gemm.name}")
            break
    formats = {d.gemm.name: d.format for d in policy.at(consumed_tokens)}
    configs = {name: _te_config(name, policy.evaluation) for name in set(formats.values())}
    for model in unwrap_model(list(chunks)):
        places = _global_names(model)
        matcher = _by_name({local: formats[name] for local, name in places.items()})
        recipe = RecipeConfig([matcher], configs)
        # Megatron's own loop at the end of HybridModel.__init__, with a recipe for this stage.
        for local in places:
            model.get_submodule(local).finish_init(get_quant_config_or_none(local, recipe))


def applied_formats(
    chunks: Sequence["nn.Module"], policy: Policy, consumed_tokens: float = 0
) -> dict[str, tuple[str, str]]:
    """What the modules ran in, after a training step and before anything else runs.

    Args:
        consumed_tokens: tokens consumed when that step started.

    Returns:
        Global name of each module of these chunks -> (format of the policy, format it ran in), as
        `policy.in_full` writes them.
    """
    wanted = policy.wanted(consumed_tokens)
    return {name: (wanted[name], ran_in(module)) for name, module in linear_modules(chunks).items()}


def check_applied(formats: Mapping[str, tuple[str, str]]) -> None:
    """Check what `applied_formats` found.

    Raises:
        PrecisionError: modules that ran in another format than the policy's.
    """
    wrong = [f"{n} ran in {ran} instead of {w}" for n, (w, ran) in formats.items() if ran != w]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise PrecisionError(
            f"the precision policy was not followed: {'; '.join(wrong[:SHOWN])}{more}; "
            "use a Transformer Engine that has the format, or another precision"
        )


def ran_in(module: "nn.Module") -> str:
    """The format of the last forward pass of a linear module; bf16: not quantised.

    Transformer Engine and the stand-in keep the recipe of the last forward pass in `fp8_meta`.
    """
    if not module.fp8:
        return "bf16"
    recipe: Any = module.fp8_meta["recipe"]  # type: ignore[index]
    if recipe.custom():
        return str(recipe.qfactory.__name__)
    name = "mxfp8" if recipe.mxfp8() else type(recipe).__name__
    if recipe.nvfp4():
        # What quantisers are made of; it may not be what the run's recipe says.
        x, weight = recipe.fp4_quant_fwd_inp, recipe.fp4_quant_fwd_weight
        grad = recipe.fp4_quant_bwd_grad
        has = {
            "rht": x.random_hadamard_transform and grad.random_hadamard_transform,
            "stochastic_rounding": grad.stochastic_rounding,
            "2d_quantization": weight.fp4_2d_quantization,
        }
        name = in_full("nvfp4", [part for part in NVFP4_PARTS if not has[part]])
    variants = {key: getattr(recipe, key, None) for key in VARIANTS}
    odd = [
        f"{key}={value}" for key, value in variants.items() if value not in (None, False, "none")
    ]
    return f"{name} with {', '.join(odd)}" if odd else name


def block_formats(precision: PrecisionConfig) -> set[str]:
    """nvfp4 and mxfp8, if the recipe names them (and bf16)."""
    return {block_format(name) for name in _formats(precision)}


def _formats(precision: PrecisionConfig) -> Iterator[str]:
    """Every format the recipe names."""
    for rules in (precision.rules, precision.extra_rules, precision.switch.rules):
        yield from (rule.format for rule in rules)
    yield from filter(None, (precision.switch.to, precision.evaluation))


def linear_modules(chunks: Sequence["nn.Module"]) -> dict[str, "nn.Module"]:
    """The modules of these chunks that can be quantised, by their global names."""
    from megatron.core.utils import unwrap_model

    return {
        name: model.get_submodule(local)
        for model in unwrap_model(list(chunks))
        for local, name in _global_names(model).items()
    }


def _global_names(model: "nn.Module") -> dict[str, str]:
    """Names of a chunk's linear modules -> their names in the whole model. Megatron counts the
    layers of a chunk from 0 in names, but each layer knows its number (from 1) in the model."""
    names = {}
    for name, module in model.named_modules():
        if not hasattr(module, "finish_init"):
            continue
        head, _, rest = name.partition("decoder.layers.")
        if not head and rest:
            index, _, inner = rest.partition(".")
            number = model.get_submodule(f"decoder.layers.{index}").layer_number
            names[name] = f"decoder.layers.{int(number) - 1}.{inner}"  # type: ignore[arg-type]
        else:
            names[name] = name
    return names


def _by_name(keys: Mapping[str, str]) -> Any:
    """A matcher of Megatron that looks a module's name up."""
    from megatron.core.quantization.quant_config import MatchContext, Matcher

    class ByName(Matcher):
        def match(self, context: MatchContext) -> str | None:
            return keys[context.module_path]

    return ByName()


def _te_config(name: str, evaluation: str | None) -> dict[str, Any]:
    """Megatron's TEQuantizationParams for a format, as a configuration file would give them."""
    config = {
        "transformer_engine_config_type": "TEQuantizationParams",
        "training_recipe": _te_recipe(name),
    }
    if evaluation is not None and is_quantized(name):
        config["evaluation_recipe"] = _te_recipe(evaluation)
    return config


def _te_recipe(name: str) -> dict[str, Any]:
    """Megatron's TEQuantizationRecipe for a format. It overrides a quantised context by default;
    here it also quantises outside of one (eh_proj of MTP has none under fp4)."""
    if not is_quantized(name):
        return {}
    bits = "fp4" if block_format(name) == "nvfp4" else "fp8"
    recipe: dict[str, Any] = {"override_nonquantized_autocast": True}
    if name == block_format(name):
        return recipe | {f"{bits}_quantization_recipe": name}
    return recipe | {
        f"{bits}_quantization_recipe": "custom",
        "custom_recipe_factory": f"precision.factories.{name}",
    }
