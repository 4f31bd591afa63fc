"""A Megatron checkpoint -> a Hugging Face folder."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.conversion.common import (
    HF_EXTRAS,
    check_options,
    compare,
    cut,
    numel,
    report,
    saved_model,
    task,
    wanted_dtype,
    write_json,
)
from model.conversion.config import check_expressible, config_json
from model.conversion.quantized import Quantizer
from model.conversion.safetensors_files import INDEX, SINGLE, write_file
from model.conversion.table import Pair, pairs
from model.conversion.tokenizer import SPECIAL, copy_tokenizer, read_json, special_tokens
from model.conversion.torch_dist import (
    Checksums,
    TorchDistReader,
    find_checkpoint,
    native_shapes,
    saved_recipe,
)
from model.conversion.work import Work, explained
from recipes.errors import CheckpointError
from recipes.schema import ConvertConfig

_KEPT = ("initializer_range", "rescale_prenorm_residual", "mamba_ssm_cache_dtype")
"""Fields of an imported config.json that an export repeats."""


@explained
def to_hf(options: ConvertConfig) -> Path:
    """Write the folder options.target from the checkpoint or run options.source.

    Raises:
        ConfigError: an option is missing or out of range.
        CheckpointError: the checkpoint is missing, damaged or incomplete, holds other tensors than
            its model has, or is a model that Hugging Face's Nemotron-H cannot express.
    """
    started = time.monotonic()
    source, target = check_options(options)
    checkpoint = find_checkpoint(source)
    recipe = saved_recipe(checkpoint)
    model = saved_model(checkpoint, recipe)
    check_expressible(model, str(checkpoint))
    reader = TorchDistReader(checkpoint, Checksums(checkpoint) if options.verify else None)
    plan = pairs(model)
    compare(checkpoint, native_shapes(plan), reader.shapes)
    tokenizer = _tokenizer(options, checkpoint, recipe)
    quantizer = Quantizer(options.quantize, model, options.calibration)
    work = Work(target, task("to_hf", checkpoint, reader.files(), model, options))

    def dtype(pair: Pair) -> torch.dtype:
        if pair.row.fp32:
            return torch.float32
        return wanted_dtype(options) or reader.dtype(pair.native[0].name)

    def size(pair: Pair) -> int:
        written = quantizer.entries(pair, dtype(pair))
        return sum(numel(shape) * kind.itemsize for _, kind, shape in written)

    parts, sizes = cut(plan, size, options.shard_gigabytes)
    files = [_file_name(i, len(parts)) for i in range(len(parts))]

    def write(part: int, advance: Callable[[int], object]) -> None:
        def tensors() -> Iterator[Tensor]:
            for pair in parts[part]:
                values = pair.to_hf([reader.read(spec) for spec in pair.native])
                yield from quantizer.tensors(pair, values, dtype(pair))
                advance(size(pair))

        entries = [e for pair in parts[part] for e in quantizer.entries(pair, dtype(pair))]
        write_file(target / files[part], entries, tensors())

    work.run(sizes, write, options.workers, "writing")
    places = {
        name: files[i]
        for i, part in enumerate(parts)
        for pair in part
        for name, _, _ in quantizer.entries(pair, dtype(pair))
    }
    if len(parts) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": places})
    matrices = next(dtype(pair) for pair in plan if not pair.row.fp32)
    config = config_json(model, str(matrices).removeprefix("torch."))
    former = _imported(checkpoint, recipe)
    config |= _said(former, _KEPT)
    # Readers take tokens 0, 1 and 2 where nothing is said.
    config |= dict.fromkeys(SPECIAL)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, target)
        config |= special_tokens(tokenizer)
        if former is not None and tokenizer.samefile(former):
            config |= _said(former, SPECIAL)
    if quantizer:
        write_json(target / "hf_quant_config.json", quantizer.config(plan))
        config["quantization_config"] = quantizer.hf_config(plan)
    report(
        target,
        started,
        direction="to_hf",
        source=str(checkpoint),
        tensors=len(places),
        bytes=sum(sizes),
    )
    write_json(target / "config.json", config)
    work.finish()
    return target


def _file_name(part: int, parts: int) -> str:
    return SINGLE if parts == 1 else f"model-{part + 1:05d}-of-{parts:05d}.safetensors"


def _imported(checkpoint: Path, recipe: dict[str, Any]) -> Path | None:
    """What else the Hugging Face folder held that the weights came from, or those that their run
    went on from; None: there was none, or it is gone."""
    seen: set[Path] = set()
    while checkpoint not in seen:
        seen.add(checkpoint)
        if (checkpoint / HF_EXTRAS).is_dir():
            return checkpoint / HF_EXTRAS
        before = recipe.get("checkpoint", {}).get("load")
        if before is None:
            break
        try:
            checkpoint = find_checkpoint(Path(before).expanduser())
            recipe = saved_recipe(checkpoint)
        except CheckpointError:
            break
    return None


def _said(former: Path | None, fields: Sequence[str]) -> dict[str, Any]:
    """What the config.json of an import says of matters that are not the model's."""
    config = {} if former is None else read_json(former / "config.json")
    return {name: config[name] for name in fields if name in config}


def _tokenizer(options: ConvertConfig, checkpoint: Path, recipe: dict[str, Any]) -> Path | None:
    """The folder of the tokenizer: the given one, that of the import, or that of the run."""
    if options.tokenizer is not None:
        folder = Path(options.tokenizer).expanduser()
        if not any((folder / f"tokenizer.{kind}").exists() for kind in ("json", "model")):
            raise CheckpointError(
                f"convert.tokenizer={folder} holds no tokenizer.json; give a folder that does"
            )
        return folder
    imported = checkpoint / HF_EXTRAS
    if imported.is_dir():
        return imported
    used = recipe.get("data", {}).get("tokenizer", {})
    if used.get("library") == "huggingface" and Path(used.get("path") or "/nowhere").is_dir():
        return Path(used["path"])
    return None
