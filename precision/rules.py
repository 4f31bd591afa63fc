"""One rule of a precision policy: which layers, which modules, what format."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from recipes.rules import fail
from recipes.schema import PrecisionRule

MTP = None
"""Stands for multi-token prediction where layers of the decoder have a number."""

Layers = frozenset[int | None]
"""Global numbers of decoder layers, and MTP."""

LAYERS_HELP = "use all, mtp, last 15%, first 2, 7, 0-13 or a list such as [3, 7-9]"


@dataclass(frozen=True)
class Rule:
    """A rule with its layers resolved for one model."""

    key: str
    """Where it stands in the recipe: precision.rules[2]."""
    layers: Layers
    text: str
    """`layers` as the recipe writes it."""
    module: str
    """Glob over the name of a module inside its layer."""
    format: str
    why: str
    optional: bool
    """May decide nothing."""

    def matches(self, layer: int | None, module: str) -> bool:
        """Whether it speaks of this module of this layer (None: MTP)."""
        return layer in self.layers and fnmatchcase(module, self.module)

    def __str__(self) -> str:
        return f"{self.key} (layers: {self.text}, module: {self.module})"


def read_rules(key: str, rules: Sequence[PrecisionRule], num_layers: int) -> tuple[Rule, ...]:
    """The rules under one key of the recipe, for a decoder of `num_layers` layers.

    Raises:
        ConfigError: layers that cannot be read or that the model does not have.
    """
    return tuple(
        Rule(
            key=f"{key}[{i}]",
            layers=_layers(f"{key}[{i}].layers", rule.layers, num_layers),
            text=_text(rule.layers),
            module=rule.module,
            format=rule.format,
            why=rule.why,
            optional=rule.optional,
        )
        for i, rule in enumerate(rules)
    )


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _layers(key: str, value: Any, num_layers: int) -> Layers:
    if isinstance(value, list):
        return frozenset().union(*(_layers(key, one, num_layers) for one in value))
    text = str(value).strip()
    if text == "all":
        return frozenset([*range(num_layers), MTP])
    if text == "mtp":
        return frozenset([MTP])
    if end := re.fullmatch(r"(first|last) (\d+(?:\.\d+)?)(%?)", text):
        count = float(end[2])
        if end[3]:
            # Rounded first: 0.15 * 20 is 3.0000000000000004 in binary, and not four layers.
            count = math.ceil(round(count * num_layers / 100, 9))
        if count != int(count) or count > num_layers:
            fail(key, value, f"is no number of the {num_layers} layers", LAYERS_HELP)
        layers = range(num_layers)
        return frozenset(
            layers[: int(count)] if end[1] == "first" else layers[num_layers - int(count) :]
        )
    span = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if span is None:
        fail(key, value, "names no layers", LAYERS_HELP)
    first, last = int(span[1]), int(span[2] or span[1])
    if first > last or last >= num_layers:
        fail(
            key,
            value,
            f"is not among the {num_layers} layers of the decoder",
            f"use numbers from 0 to {num_layers - 1}, counted over all pipeline stages",
        )
    return frozenset(range(first, last + 1))
