"""Quantization contexts, and what modules make of the recipe of the open one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..common.recipe import CustomRecipe, Format, MXFP8BlockScaling, NVFP4BlockScaling, Recipe
from .constants import DType
from .module import refuse
from .quantized_tensor import Quantizer
from .tensor import MXFP8Quantizer, NVFP4Quantizer


@dataclass(frozen=True)
class QuantizerRole:
    """The tensor a factory of CustomRecipe is asked for a quantizer of.

    Attributes:
        module_type: "linear" or "grouped_linear".
        tensor_type: "input", "weight" or "grad_output".
        name: the module's, if it was given one.
    """

    module_type: str = ""
    tensor_type: str = ""
    name: str = ""


@dataclass
class QuantizationState:
    """The open context, and the draws of stochastic rounding."""

    enabled: bool = False
    recipe: Recipe | None = None
    group: Any = None
    first_module: bool = False
    seed: int = 0
    generators: dict[str, torch.Generator] = field(default_factory=dict)


class FP8GlobalStateManager:
    """What Megatron-Core asks about the current quantization context.

    It also keeps the generator that stochastic rounding draws from, one a process and device, so
    that seeding, saving and restoring it have one place. (The real library draws from the CUDA
    generator.)
    """

    quantization_state = QuantizationState()

    @classmethod
    def reset(cls) -> None:
        """Forget all state."""
        cls.quantization_state = QuantizationState()

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether a context that quantizes is open."""
        return cls.quantization_state.enabled

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        """Whether statistics are collected; never."""
        return False

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        """Whether parameters are made quantized; never."""
        return False

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        """True once in an outermost context."""
        state = cls.quantization_state
        first, state.first_module = state.first_module, False
        return first

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        """The recipe of the open context; without one the library's default where there is
        native FP4, by which Megatron pads the experts of layers that are not quantized."""
        return cls.quantization_state.recipe or MXFP8BlockScaling()

    @classmethod
    def get_fp8_group(cls) -> Any:
        """The group of the open context; block-scaled recipes share no maxima over it."""
        return cls.quantization_state.group

    @classmethod
    def seed_stochastic_rounding(cls, seed: int) -> None:
        """Start the draws again from `seed`, which should differ between ranks."""
        cls.quantization_state.seed = seed
        cls.quantization_state.generators = {}

    @classmethod
    def stochastic_rounding_generator(cls, device: torch.device) -> torch.Generator:
        """The generator of a device, made and seeded when it is first asked for."""
        state = cls.quantization_state
        if str(device) not in state.generators:
            generator = torch.Generator(device)
            generator.manual_seed(state.seed)
            state.generators[str(device)] = generator
        return state.generators[str(device)]

    @classmethod
    def get_stochastic_rounding_state(cls) -> dict[str, Any]:
        """{"seed": int, "generators": {device: state}}, for a checkpoint."""
        state = cls.quantization_state
        return {
            "seed": state.seed,
            "generators": {name: g.get_state() for name, g in state.generators.items()},
        }

    @classmethod
    def set_stochastic_rounding_state(cls, saved: dict[str, Any]) -> None:
        """Continue the draws where `get_stochastic_rounding_state` was called."""
        cls.seed_stochastic_rounding(saved["seed"])
        for name, generator_state in saved["generators"].items():
            cls.stochastic_rounding_generator(torch.device(name)).set_state(generator_state)


@dataclass(frozen=True)
class Quantizers:
    """Of the three tensors that enter the products of a linear layer."""

    input: Quantizer
    weight: Quantizer
    grad_output: Quantizer


def make_quantizers(recipe: Recipe, module_type: str, name: str) -> Quantizers:
    """The quantizers of a recipe that `check_recipe` accepts.

    Raises:
        ValueError: a factory returned None.
    """
    if isinstance(recipe, NVFP4BlockScaling):
        found: list[Any] = [
            NVFP4Quantizer(
                with_rht=kind.random_hadamard_transform,
                with_post_rht_amax=kind.random_hadamard_transform,
                with_2d_quantization=kind.fp4_2d_quantization,
                stochastic_rounding=kind.stochastic_rounding,
            )
            for kind in (
                recipe.fp4_quant_fwd_inp,
                recipe.fp4_quant_fwd_weight,
                recipe.fp4_quant_bwd_grad,
            )
        ]
    elif isinstance(recipe, MXFP8BlockScaling):
        backward = DType.kFloat8E4M3 if recipe.fp8_format == Format.E4M3 else DType.kFloat8E5M2
        found = [
            MXFP8Quantizer(DType.kFloat8E4M3),
            MXFP8Quantizer(DType.kFloat8E4M3, with_2d_quantization=recipe.enable_2d_quantization),
            MXFP8Quantizer(backward),
        ]
    else:
        assert isinstance(recipe, CustomRecipe)
        roles = [QuantizerRole(module_type, t, name) for t in ("input", "weight", "grad_output")]
        found = [recipe.qfactory(role) for role in roles]
        for role, quantizer in zip(roles, found, strict=True):
            if quantizer is None:
                raise ValueError(
                    f"the factory {recipe.qfactory.__name__} returned None for {role}; return an "
                    "IdentityQuantizer for high precision"
                )
            if not isinstance(quantizer, Quantizer):
                raise NotImplementedError(
                    f"the Transformer Engine stand-in does not implement the quantizer "
                    f"{type(quantizer).__name__} that {recipe.qfactory.__name__} returned"
                )
    return Quantizers(*found)


def recipe_name(recipe: Recipe) -> str:
    """nvfp4, mxfp8, or the name of the factory."""
    if isinstance(recipe, CustomRecipe):
        return str(getattr(recipe.qfactory, "__name__", recipe.qfactory))
    return "nvfp4" if recipe.nvfp4() else "mxfp8"


def check_recipe(recipe: Recipe | None) -> None:
    """Raise NotImplementedError for what this stand-in does not compute."""
    if not isinstance(recipe, NVFP4BlockScaling | MXFP8BlockScaling | CustomRecipe):
        name = "the default recipe" if recipe is None else type(recipe).__name__
        raise NotImplementedError(
            f"the Transformer Engine stand-in does not implement {name}; it has "
            "NVFP4BlockScaling, MXFP8BlockScaling and CustomRecipe"
        )
    asked = {"fp8_dpa": recipe.fp8_dpa, "fp8_mha": recipe.fp8_mha}
    if isinstance(recipe, NVFP4BlockScaling):
        asked["row_scaled_activation"] = recipe.row_scaled_activation
        asked["nvfp4_4over6"] = recipe.nvfp4_4over6 != "none"
    if isinstance(recipe, MXFP8BlockScaling):
        asked["margin"] = recipe.margin != 0
        asked["fp8_format=E5M2"] = recipe.fp8_format == Format.E5M2
    refuse(type(recipe).__name__, backward_override=recipe.backward_override, **asked)


def get_align_size_for_quantization(recipe: Recipe) -> int:
    """What row counts of grouped products are padded to."""
    if isinstance(recipe, CustomRecipe):
        return recipe.quantization_alignment
    return 32 if recipe.mxfp8() else 128 if recipe.nvfp4() else 16


@contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Recipe | None = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """Context in which modules quantize their operands by `recipe`. An inner context, enabled or
    not, replaces an outer one until it ends.

    Raises:
        NotImplementedError: a recipe, or a setting of one, that this stand-in does not compute.
    """
    refuse("autocast", calibrating=calibrating, _graph=_graph)
    if enabled:
        check_recipe(recipe)
    state = FP8GlobalStateManager.quantization_state
    before = (state.enabled, state.recipe, state.group, state.first_module)
    outermost = state.recipe is None and not state.enabled
    state.enabled, state.recipe, state.group = enabled, recipe, amax_reduction_group
    state.first_module = outermost or state.first_module
    try:
        yield
    finally:
        state.enabled, state.recipe, state.group, state.first_module = before


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    """The older name of `autocast`."""
    with autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph):
        yield


@contextmanager
def quantized_model_init(
    enabled: bool = True,
    recipe: Recipe | None = None,
    preserve_high_precision_init_val: bool = False,
) -> Iterator[None]:
    """Context in which modules create quantized parameters.

    Raises:
        NotImplementedError: if enabled.
    """
    if enabled:
        raise NotImplementedError(
            "the Transformer Engine stand-in has no quantized parameters "
            "(fp8_param / fp4_param); keep them in high precision"
        )
    yield


fp8_model_init = quantized_model_init
