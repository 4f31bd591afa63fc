"""What quantisation flushed to zero, over the layers of a model: numbers and a picture."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

type Shares = dict[str, dict[str, float]]
"""Tensor -> module -> share of its non-zero values that became zero."""


def flushed(telemetry: Iterable[dict[str, Any]]) -> Shares:
    """Mean over lines of precision.jsonl; empty without any that quantised."""
    seen: dict[str, dict[str, list[float]]] = {}
    for line in telemetry:
        if line.get("flushed") is not None:
            modules = seen.setdefault(line["tensor"], {})
            modules.setdefault(line["module"], []).append(line["flushed"])
    return {
        tensor: {module: sum(v) / len(v) for module, v in modules.items()}
        for tensor, modules in seen.items()
    }


def draw(name: str, flushed: Shares, path: Path) -> Path:
    """Module kinds x layers, one panel a tensor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modules = sorted({m for values in flushed.values() for m in values})
    kinds = sorted({kind(m)[1] for m in modules})
    places = sorted({kind(m)[0] for m in modules}, key=_place_order)
    size = (max(6.0, 1.8 + 0.42 * len(places)), 1.1 + len(flushed) * (0.7 + 0.3 * len(kinds)))
    figure, panels = plt.subplots(
        len(flushed), 1, figsize=size, squeeze=False, layout="constrained"
    )
    top = max(0.01, *(v for values in flushed.values() for v in values.values()))
    image: Any = None
    for axes, (tensor, values) in zip(panels[:, 0], sorted(flushed.items()), strict=True):
        shares = np.full((len(kinds), len(places)), np.nan)
        for module, share in values.items():
            place, inner = kind(module)
            shares[kinds.index(inner), places.index(place)] = 100 * share
        image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=100 * top)
        axes.set_facecolor("0.92")
        axes.set_xticks(range(len(places)), places, fontsize=8)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
        axes.set_title(tensor, fontsize=10)
    panels[-1, 0].set_xlabel("layer (grey: not quantised, or not there)")
    figure.colorbar(image, ax=panels[:, 0].tolist(), label="non-zero values flushed to zero (%)")
    figure.suptitle(name, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def kind(module: str) -> tuple[str, str]:
    """(layer, name inside it): `decoder.layers.3.mixer.in_proj` -> `3`, `mixer.in_proj`; inside
    multi-token prediction the layer is `mtp` and the numbers of block and layer."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", module)
    if found:
        return found[1], found[2]
    found = re.fullmatch(r"mtp\.layers\.(\d+)\.(?:mtp_model_layer\.layers\.(\d+)\.)?(.+)", module)
    if found:
        return "mtp " + ".".join(filter(None, found.groups()[:2])), found[3]
    return "-", module


def _place_order(place: str) -> tuple[bool, list[int]]:
    return place.startswith("mtp"), [int(n) for n in re.findall(r"\d+", place)]
