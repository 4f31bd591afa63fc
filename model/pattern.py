"""The hybrid layer pattern: one symbol a layer, checked with the position of a mistake."""

from dataclasses import dataclass

from recipes.errors import ConfigError

LAYERS = {"M": "Mamba-2", "*": "attention", "E": "MoE", "-": "MLP"}


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern."""

    main: str
    """Symbols of the decoder, without stage boundaries."""
    stages: tuple[str, ...]
    """The decoder cut at every `|`; one entry when it has none."""
    mtp: str
    """Symbols of one multi-token-prediction depth; empty without MTP."""
    mtp_depths: int
    """How often the main loss is joined by one of a further token."""

    @property
    def num_layers(self) -> int:
        """Decoder layers, MTP not counted."""
        return len(self.main)


def parse_pattern(pattern: str) -> Pattern:
    """Parse `MEM|*E/*E/*E`.

    Raises:
        ConfigError: unknown symbol, empty part, `|` inside MTP, or MTP depths that differ.
    """
    key = f"model.hybrid_layer_pattern={pattern}"
    for position, symbol in enumerate(pattern):
        if symbol not in "|/" and symbol not in LAYERS:
            raise ConfigError(
                f"{key}: '{symbol}' at position {position} is not a layer symbol; use "
                + ", ".join(f"{s} ({name})" for s, name in LAYERS.items())
                + ", | (pipeline stage) or / (multi-token-prediction depth)"
            )
    main, *depths = pattern.split("/")
    stages = tuple(main.split("|"))
    if not main:
        raise ConfigError(f"{key}: there are no layers; write at least one of {', '.join(LAYERS)}")
    if not all(stages):
        raise ConfigError(f"{key}: a part between | is empty; each pipeline stage needs a layer")
    if not all(depths):
        raise ConfigError(f"{key}: a part after / is empty; write the layers of each MTP depth")
    if len(set(depths)) > 1:
        raise ConfigError(
            f"{key}: the MTP depths {', '.join(depths)} differ; Megatron needs them equal"
        )
    if depths and "|" in depths[0]:
        position = pattern.index("|", len(main))
        raise ConfigError(
            f"{key}: '|' at position {position} is inside an MTP depth; MTP runs on the last stage"
        )
    return Pattern(main.replace("|", ""), stages, depths[0] if depths else "", len(depths))
