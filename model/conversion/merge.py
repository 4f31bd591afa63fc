"""The mean of several checkpoints of a run, tensor by tensor."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.conversion.common import (
    compare,
    cut,
    numel,
    report,
    saved_model,
    source_state,
    write_model,
)
from model.conversion.table import Pair, Spec, pairs
from model.conversion.torch_dist import (
    METADATA,
    Checksums,
    Planned,
    TorchDistReader,
    TorchDistWriter,
    complete_checkpoints,
    find_checkpoint,
    native_shapes,
    saved_recipe,
    step_of,
)
from model.conversion.work import Work, explained
from recipes.errors import CheckpointError, ConfigError
from recipes.rules import above, at_least, fail
from recipes.schema import MergeConfig, ModelConfig

_OF_TRAINING = (
    "name",
    "hybrid_layer_pattern",
    "max_position_embeddings",
    "moe_router_bias_update_rate",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "mtp_loss_scaling_factor",
    "init_method_std",
    "hidden_dropout",
    "attention_dropout",
)
"""What two stages of one model may differ in; of the pattern, bounds of pipeline stages, since the
tensors tell the layers."""


def minus_sqrt_weights(count: int) -> list[float]:
    """Weights, oldest first, that make the mean of checkpoints of a constant learning rate what a
    minus-sqrt decay over their window would have made of the same updates.

    The mean counts the updates before checkpoint i with the weights of i and of all later ones;
    the decay counts them with 1 - sqrt((i - 1) / count). So weight i is
    sqrt(i / count) - sqrt((i - 1) / count): the oldest counts most. They sum to 1.
    """
    roots = [math.sqrt(i / count) for i in range(count + 1)]
    return [after - before for before, after in zip(roots, roots[1:], strict=False)]


@explained
def merge(options: MergeConfig) -> tuple[Path, list[tuple[Path, float]]]:
    """Write options.target, the weighted mean of checkpoints. The mean is taken in FP32.

    Returns:
        The folder, and each checkpoint with its weight.

    Raises:
        ConfigError: an option is missing or does not fit.
        CheckpointError: a checkpoint is missing, damaged, or of another model.
    """
    started = time.monotonic()
    if options.target is None:
        raise ConfigError("merge.target is not given; name the sources, then the target")
    above("merge.shard_gigabytes", options.shard_gigabytes, 0)
    at_least("merge.workers", options.workers, 1)
    target = Path(options.target).expanduser()
    checkpoints = _checkpoints(options)
    weights = options.weights or minus_sqrt_weights(len(checkpoints))
    _check_weights(weights, checkpoints)
    recipe = saved_recipe(checkpoints[0])
    if options.evaluate and "data" not in recipe:
        fail(
            "merge.evaluate",
            True,
            f"needs the held-out data of a run, and {checkpoints[0]} was imported",
            "use false",
        )
    model = saved_model(checkpoints[0], recipe)
    for checkpoint in checkpoints[1:]:
        _check_same(model, saved_model(checkpoint, saved_recipe(checkpoint)), checkpoint)
    plan = pairs(model)
    readers = [TorchDistReader(path, Checksums(path)) for path in checkpoints]
    for reader in readers:
        compare(reader.folder, native_shapes(plan), reader.shapes)
    work = Work(target, _task(readers, weights, options))

    def dtype(pair: Pair) -> torch.dtype:
        return readers[0].dtype(pair.native[0].name)

    def size(pair: Pair) -> int:
        return sum(numel(s.shape) for s in pair.native) * dtype(pair).itemsize

    def mean(spec: Spec) -> Tensor:
        total = torch.zeros(spec.shape)
        for reader, weight in zip(readers, weights, strict=True):
            total += weight * reader.read(spec).float()
        return total

    parts, sizes = cut(plan, size, options.shard_gigabytes)
    writer = TorchDistWriter(
        target, [[Planned(s, dtype(p)) for p in part for s in p.native] for part in parts]
    )

    def write(part: int, advance: Callable[[int], object]) -> Any:
        def tensors() -> Iterator[Tensor]:
            for pair in parts[part]:
                yield from (mean(spec).to(dtype(pair)) for spec in pair.native)
                advance(size(pair))

        return writer.write(part, tensors())

    written = work.run(sizes, write, options.workers, "merging")
    write_model(model, target, recipe)
    chosen = list(zip(checkpoints, weights, strict=True))
    report(target, started, merged={str(path): weight for path, weight in chosen})
    writer.finish(written)
    work.finish()
    return target, chosen


def _checkpoints(options: MergeConfig) -> list[Path]:
    """The checkpoints to merge, oldest first."""
    sources = [Path(source).expanduser() for source in options.sources]
    if len(sources) == 1 and not (sources[0] / METADATA).exists():
        newest = find_checkpoint(sources[0])  # says what is missing
        last = step_of(newest.name)
        # Later ones are of a future that checkpoint.allow_previous went back from.
        found = complete_checkpoints(newest.parent).items()
        complete = [path for step, path in found if last is None or step <= last]
        sources = complete if options.last is None else complete[-options.last :]
    at_least("merge.last", options.last, 2, "all")
    if len(sources) < 2:
        raise ConfigError(
            f"merge.sources={[str(s) for s in options.sources]} leaves {len(sources)} checkpoints; "
            "give two or more, or a run that has kept several (checkpoint.keep_last, keep_every)"
        )
    return [find_checkpoint(source) for source in sources]


def _check_same(first: ModelConfig, other: ModelConfig, where: Path) -> None:
    """Weights of the same shapes may be of models that compute otherwise."""
    values = asdict(first)
    for key, value in asdict(other).items():
        if key not in _OF_TRAINING and value != values[key]:
            raise CheckpointError(
                f"{where} is of another model: {key}={json.dumps(value)} instead of "
                f"{json.dumps(values[key])}; merge checkpoints of one model"
            )


def _check_weights(weights: Sequence[float], checkpoints: Sequence[Path]) -> None:
    if len(weights) != len(checkpoints):
        fail(
            "merge.weights",
            list(weights),
            f"has {len(weights)} entries for {len(checkpoints)} checkpoints",
            "give one each, oldest first",
        )
    if not abs(sum(weights) - 1) <= 1e-6:  # nor is NaN
        fail("merge.weights", list(weights), f"sums to {sum(weights):g}", "let it sum to 1")


def _task(readers: Sequence[TorchDistReader], weights: Sequence[float], options: Any) -> Any:
    """What identifies a merge."""
    return {
        "merge": [source_state(r.folder, r.files()) for r in readers],
        "weights": list(weights),
        "shard_gigabytes": options.shard_gigabytes,
    }
