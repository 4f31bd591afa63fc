"""Starting from the weights of another checkpoint: `checkpoint.load`."""

from itertools import chain
from pathlib import Path
from typing import Any

from data.ranks import on_first_rank, raise_together
from model.conversion.torch_dist import TorchDistReader, find_checkpoint
from model.integrity import INTEGRITY
from recipes.errors import CheckpointError
from train.checkpoint import some
from train.checksums import damage
from train.state import TrainState


def load_weights(path: Path, state: TrainState) -> Path:
    """Load the model of a run or checkpoint into a fresh state. A collective.

    Optimizer moments, schedule, random states and the position in the data stay as they are; the
    optimizer's FP32 weights become the loaded ones. Returns and raises as `load_model`.
    """
    folder = load_model(path, state.chunks)
    state.optimizer.reload_model_params()
    return folder


def load_model(path: Path, chunks: list[Any]) -> Path:
    """Load the weights of a run or checkpoint into this rank's model chunks. A collective.

    Any layout can load what any other saved.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: there is none, or it does not hold this model's weights.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.utils import unwrap_model

    folder = find_checkpoint(path)
    weights = on_first_rank(lambda: TorchDistReader(folder).shapes)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    request: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        sharded = unwrap_model(chunk).sharded_state_dict(metadata={"dp_cp_group": group})
        # Transformer Engine's own state belongs to a run's formats, not to the weights.
        request[str(i)] = {k: v for k, v in sharded.items() if not _is_extra_state(k)}
    _check_shapes(path, request, weights)
    # Megatron saves without checksums unless it is asked for them.
    wrong = damage(folder) if on_first_rank(lambda: (folder / INTEGRITY).exists()) else None
    if wrong is not None:
        raise CheckpointError(f"checkpoint.load={path} is damaged ({wrong}); restore it")
    try:
        loaded, missing, unexpected = dist_checkpointing.load(
            request,
            str(folder),
            strict=StrictHandling.RETURN_ALL,
        )
    except dist_checkpointing.core.CheckpointingException as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint.load={path} cannot be loaded: {reason}") from error
    missing &= weights.keys()  # the rest is a run's state
    if missing or unexpected:
        raise CheckpointError(
            f"checkpoint.load={path} does not fit this model; only in the checkpoint: "
            f"{some(missing)}; only in the model: {some(unexpected)}"
        )
    for i, chunk in enumerate(chunks):
        result = unwrap_model(chunk).load_state_dict(loaded[str(i)], strict=False)
        left = [k for k in result.missing_keys if not _is_extra_state(k)]
        assert not left and not result.unexpected_keys, (left, result.unexpected_keys)
    return folder


def _check_shapes(path: Path, request: dict[str, Any], weights: dict[str, Any]) -> None:
    """A tensor of another size would end the ranks with a traceback each."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    # Mamba's joined matrices are saved in parts, which their factory makes.
    values = list(nested_values(request))
    parts = [nested_values(v.build()) for v in values if isinstance(v, ShardedTensorFactory)]
    other = {
        f"{t.key} {list(weights[t.key])} instead of {list(t.global_shape)}"
        for t in chain(values, *parts)
        if isinstance(t, ShardedTensor) and weights.get(t.key, t.global_shape) != t.global_shape
    }
    error = CheckpointError(
        f"checkpoint.load={path} does not fit this model; of another size: {some(other)}"
    )
    raise_together(error if other else None)


def _is_extra_state(key: str) -> bool:
    return key.endswith("_extra_state") or "._extra_state" in key
