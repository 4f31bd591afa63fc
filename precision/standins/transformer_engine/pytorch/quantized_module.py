"""What Linear, LayerNormLinear and GroupedLinear do with the recipe of the open context."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.recipe import Recipe
from .module import WeightedModule
from .quantization import FP8GlobalStateManager, Quantizers, make_quantizers, recipe_name
from .quantized import Observer, Plan, QuantizedWeight, identity, quantize_weights
from .quantized_tensor import Casting


class QuantizedModule(WeightedModule):
    """A module with weights whose products are quantized under `autocast`.

    Attributes:
        quantized_with: what the last forward pass used: "nvfp4", "mxfp8", the name of a
            CustomRecipe's factory, or "bf16" for no quantization.
        observer: called with (module, role, what was quantized, its FP32 values afterwards) for
            each operand that is made; None: nothing is computed for it. Roles are those of
            `quantized.Observer`.
    """

    module_type = "linear"

    def __init__(
        self,
        *args: Any,
        name: str | None = None,
        save_original_input: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.name = name
        self.save_original_input = save_original_input
        self.quantized_with = "bf16"
        self.observer: Callable[[Any, str, Tensor, Tensor], None] | None = None
        self._quantizers: tuple[Recipe, Quantizers] | None = None
        self._quantized_weights: list[QuantizedWeight] = []

    def plan(
        self,
        x: Tensor,
        names: Sequence[str],
        is_first_microbatch: bool | None,
        splits: Sequence[int] | None = None,
    ) -> Plan | None:
        """What a quantized product of x with the weights `names` needs; None: no quantization.

        Args:
            is_first_microbatch: False: weights quantized before are used again, unless they
                changed in between; True: they are quantized, and kept; None: not kept.
            splits: rows of each expert.
        """
        if not FP8GlobalStateManager.is_fp8_enabled():
            self.fp8, self.quantized_with = False, "bf16"
            return None
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        if self._quantizers is None or self._quantizers[0] != recipe:
            quantizers = make_quantizers(recipe, self.module_type, self.name or "")
            self._quantizers = recipe, quantizers
            self._quantized_weights = []
        self.fp8, self.quantized_with = True, recipe_name(recipe)
        self.fp8_meta["recipe"] = recipe
        quantizers = self._quantizers[1]
        observer = None if self.observer is None else partial(self.observer, self)
        casting = Casting(FP8GlobalStateManager.stochastic_rounding_generator(x.device))
        gradients = torch.is_grad_enabled()
        both = quantizers.weight.square or (gradients and x.requires_grad)
        weights = self._weights(names, both, is_first_microbatch, casting, observer)
        return Plan(
            quantizers,
            weights,
            casting,
            observer,
            gradients,
            self.save_original_input,
            splits,
            self.parallel_mode,
            self.sequence_parallel,
            self.tp_group if self.tp_size > 1 else None,
        )

    def _weights(
        self,
        names: Sequence[str],
        both: bool,
        is_first_microbatch: bool | None,
        casting: Casting,
        observer: Observer | None,
    ) -> list[QuantizedWeight]:
        weights = [getattr(self, name) for name in names]
        kept = self._quantized_weights
        current = len(kept) == len(weights) and all(
            k.source == identity(w) and (k.columnwise is not None or not both)
            for k, w in zip(kept, weights, strict=True)
        )
        if is_first_microbatch is False and current:
            return kept
        assert self._quantizers is not None
        made = quantize_weights(self._quantizers[1].weight, weights, both, casting, observer)
        if is_first_microbatch is not None:
            self._quantized_weights = made
        return made
