"""What both directions need: options, parts, comparing names, what is written beside weights."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.conversion.table import Pair, Shape
from model.integrity import checksum
from model.validate import validate_model
from recipes.errors import CheckpointError, ConfigError
from recipes.rules import above, at_least, one_of
from recipes.schema import ConvertConfig, ModelConfig

REPORT = "conversion.json"
"""Written into the target: what was made from what."""
HF_EXTRAS = "hf"
"""In an imported checkpoint: what its Hugging Face folder held besides weights."""

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SHOWN = 6


def check_options(options: ConvertConfig) -> tuple[Path, Path]:
    """Source and target.

    Raises:
        ConfigError: an option is missing or out of range.
    """
    for name in ("source", "target"):
        if getattr(options, name) is None:
            raise ConfigError(f"convert.{name} is not given; see --help")
    one_of("convert.dtype", options.dtype, (None, *_DTYPES))
    above("convert.shard_gigabytes", options.shard_gigabytes, 0)
    at_least("convert.workers", options.workers, 1)
    return Path(str(options.source)).expanduser(), Path(str(options.target)).expanduser()


def wanted_dtype(options: ConvertConfig) -> torch.dtype | None:
    """convert.dtype; None: as in the source."""
    return _DTYPES[options.dtype] if options.dtype else None


def numel(shape: Shape) -> int:
    """Elements of a tensor."""
    return torch.Size(shape).numel()


def cut(
    plan: Sequence[Pair], size: Callable[[Pair], int], gigabytes: float
) -> tuple[list[list[Pair]], list[int]]:
    """The plan in consecutive parts of at most so many bytes (10^9), and their sizes."""
    parts: list[list[Pair]] = [[]]
    sizes = [0]
    for pair in plan:
        if parts[-1] and sizes[-1] + size(pair) > gigabytes * 1e9:
            parts.append([])
            sizes.append(0)
        parts[-1].append(pair)
        sizes[-1] += size(pair)
    return parts, sizes


def compare(where: Path, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Each tensor of the model is there, with its shape, and there is no other.

    Raises:
        CheckpointError: lists those that are missing, unknown or of another shape.
    """
    shapes = [
        f"{n} {list(found[n])} instead of {list(s)}"
        for n, s in wanted.items()
        if n in found and found[n] != s
    ]
    problems = {
        "missing": [n for n in wanted if n not in found],
        "not in the model": [n for n in found if n not in wanted],
        "of another shape": shapes,
    }
    if any(problems.values()):
        raise CheckpointError(
            f"{where} does not hold the tensors of its model: "
            + "; ".join(f"{len(v)} {kind}: {_some(v)}" for kind, v in problems.items() if v)
        )


def task(
    direction: str,
    source: Path,
    files: Iterable[Path],
    model: ModelConfig,
    options: ConvertConfig,
) -> Any:
    """What identifies a conversion: the same again goes on where it was left."""
    return {
        "direction": direction,
        "model": asdict(model),
        "source": source_state(source, files),
        "dtype": options.dtype,
        "quantize": options.quantize,
        "calibration": options.calibration and checksum(Path(options.calibration)),
        "shard_gigabytes": options.shard_gigabytes,
    }


def source_state(source: Path, files: Iterable[Path]) -> list[Any]:
    """The name of a folder and the sizes and times of its files."""
    states = [f.stat() for f in files if f.exists()]
    return [str(source.resolve()), [[s.st_size, s.st_mtime_ns] for s in states]]


def saved_model(checkpoint: Path, recipe: Mapping[str, Any]) -> ModelConfig:
    """The model group of the recipe saved with a checkpoint; keys of other versions are dropped.

    Raises:
        CheckpointError: a value is missing or of the wrong type, or there is no such model.
    """
    known = {f.name for f in fields(ModelConfig)}
    found = {k: v for k, v in recipe["model"].items() if k in known}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), found)
        model = cast(ModelConfig, OmegaConf.to_object(merged))
        validate_model(model)
    except (OmegaConfBaseException, ConfigError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"the recipe saved with {checkpoint} is no model: {reason}"
        ) from error
    return model


def write_model(model: ModelConfig, folder: Path, recipe: Mapping[str, Any] | None = None) -> Path:
    """Write the model beside its weights: config.json, and a recipe of the group `model`.

    Args:
        model: what the weights are of.
        folder: of the weights.
        recipe: other groups of config.json: those of the run the weights come from.

    Returns:
        The folder to give as --config-dir.
    """
    write_json(folder / "config.json", {**(recipe or {}), "model": asdict(model)})
    recipes = folder / "recipes"
    (recipes / "model").mkdir(parents=True, exist_ok=True)
    lines = yaml.safe_dump(asdict(model), sort_keys=False)
    (recipes / "model" / f"{model.name}.yaml").write_text(lines)
    return recipes


def report(target: Path, started: float, **facts: Any) -> None:
    """Write conversion.json."""
    seconds = time.monotonic() - started
    write_json(target / REPORT, facts | {"seconds": round(seconds, 3)})


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
