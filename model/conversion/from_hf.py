"""A Hugging Face folder -> a Megatron checkpoint of weights to start from."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
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
    task,
    wanted_dtype,
    write_model,
)
from model.conversion.config import read_model_config
from model.conversion.safetensors_files import SafetensorsReader
from model.conversion.table import Pair, Shape, pairs
from model.conversion.tokenizer import copy_extras
from model.conversion.torch_dist import (
    Planned,
    TorchDistWriter,
    native_shapes,
)
from model.conversion.work import Work, explained
from recipes.rules import fail
from recipes.schema import ConvertConfig

_FUSED = re.compile(r"(.*\.mixer\.experts)\.(up_proj|down_proj)$")
"""All experts in one tensor, as transformers holds them in memory."""


@explained
def from_hf(options: ConvertConfig, say: Callable[[str], None]) -> Path:
    """Write the checkpoint options.target from the folder options.source.

    Args:
        options: the recipe's convert group.
        say: tells the user what was decided.

    Raises:
        ConfigError: an option is missing or out of range.
        CheckpointError: the folder is missing, damaged or incomplete, holds other tensors than its
            model has, or is a model that Megatron cannot express.
    """
    started = time.monotonic()
    source, target = check_options(options)
    if options.quantize is not None:
        fail("convert.quantize", options.quantize, "is for to_hf", "leave it out")
    if options.calibration is not None:
        fail("convert.calibration", options.calibration, "is for to_hf", "leave it out")
    model = read_model_config(source)
    reader = SafetensorsReader(source)
    theirs = _Names(reader)
    if "/" in model.hybrid_layer_pattern and not any(n.startswith("mtp.") for n in theirs.shapes):
        say(
            f"{source / 'config.json'} announces multi-token prediction, but there are no mtp.* "
            "tensors: converted without it"
        )
        main = model.hybrid_layer_pattern.split("/")[0]
        model = replace(model, hybrid_layer_pattern=main)
    plan = pairs(model)
    compare(source, {s.name: s.shape for pair in plan for s in pair.hf}, theirs.shapes)
    files = sorted({entry.file for entry in reader.entries.values()})
    work = Work(target, task("from_hf", source, files, model, options))

    kinds = theirs.dtypes(plan)

    def dtype(pair: Pair) -> torch.dtype:
        found = kinds[pair.native[0].name]
        return found if pair.row.fp32 else wanted_dtype(options) or found

    def size(pair: Pair) -> int:
        return sum(numel(s.shape) for s in pair.native) * dtype(pair).itemsize

    parts, sizes = cut(plan, size, options.shard_gigabytes)
    writer = TorchDistWriter(
        target,
        [[Planned(spec, dtype(p)) for p in part for spec in p.native] for part in parts],
    )

    def write(part: int, advance: Callable[[int], object]) -> Any:
        def tensors() -> Iterator[Tensor]:
            for pair in parts[part]:
                values = pair.from_hf([theirs.read(spec.name) for spec in pair.hf])
                yield from (value.to(dtype(pair)) for value in values)
                advance(size(pair))

        return writer.write(part, tensors())

    written = work.run(sizes, write, options.workers, "writing")
    copy_extras(source, target / HF_EXTRAS)
    write_model(model, target)
    tensors = len(native_shapes(plan))
    report(
        target, started, direction="from_hf", source=str(source), tensors=tensors, bytes=sum(sizes)
    )
    writer.finish(written)
    work.finish()
    return target


class _Names:
    """The tensors of a folder under the names of released checkpoints.

    transformers writes other names too: `model.` for `backbone.`, before 5.16 `embedding.` for
    `embeddings.`, and experts stacked in one tensor.
    """

    def __init__(self, reader: SafetensorsReader) -> None:
        self._reader = reader
        self._places: dict[str, tuple[str, int | None]] = {}
        self.shapes: dict[str, Shape] = {}
        for name, entry in reader.entries.items():
            plain = re.sub(r"^model\.", "backbone.", name)
            plain = re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", plain)
            fused = _FUSED.match(plain)
            if fused is None or len(entry.shape) != 3:
                self._add(plain, entry.shape, name, None)
                continue
            for i in range(entry.shape[0]):
                self._add(f"{fused[1]}.{i}.{fused[2]}.weight", entry.shape[1:], name, i)

    def _add(self, plain: str, shape: Shape, name: str, index: int | None) -> None:
        # Two tensors for one: the second keeps its own name, which no model has.
        key = name if plain in self._places else plain
        self._places[key] = name, index
        self.shapes[key] = shape

    def dtypes(self, plan: Iterable[Pair]) -> dict[str, torch.dtype]:
        """Megatron's name -> a dtype that holds all of this side's tensors exactly."""
        found: dict[str, torch.dtype] = {}
        for pair in plan:
            for spec in pair.hf:
                kind = self._reader.entries[self._places[spec.name][0]].dtype
                for name in (native.name for native in pair.native):
                    found[name] = torch.promote_types(found.get(name, kind), kind)
        return found

    def read(self, name: str) -> Tensor:
        """A tensor."""
        return self._reader.read(*self._places[name])
