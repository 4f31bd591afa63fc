"""What a rank has of an optimizer's state, as pieces of the parameters, where it is in memory.

Megatron's distributed optimizer gives each rank a range of the elements of a parameter, counted
row by row. Its own `fully_reshardable` format gathers the ranges of all ranks on all ranks, through
five copies of the whole (also of a single rank), before the first of them writes everything. What
is stored is the same either way, cut differently, and loads into any layout.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch


class Box(NamedTuple):
    """A rectangular piece of a tensor."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """Those that hold the elements start to end of a tensor, counted row by row; in order.

    >>> boxes((3, 4), 1, 9)
    [Box(offset=(0, 1), sizes=(1, 3)), Box(offset=(1, 0), sizes=(1, 4)), \
Box(offset=(2, 0), sizes=(1, 1))]
    """
    if start >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (end - 1) // row

    def inside(index: int, from_: int, to: int) -> list[Box]:
        return [Box((index, *o), (1, *s)) for o, s in boxes(shape[1:], from_, to)]

    if first == last and end - start < row:
        return inside(first, start - first * row, end - first * row)
    head = inside(first, start % row, row) if start % row else []
    tail = inside(last, 0, end % row) if end % row else []
    whole = range(first + bool(head), last + 1 - bool(tail))
    rest = tuple(0 for _ in shape[1:])
    middle = [Box((whole.start, *rest), (len(whole), *shape[1:]))] if whole else []
    return head + middle + tail


@contextlib.contextmanager
def shares_in_place(optimizer: Any) -> Iterator[None]:
    """Inside, optimizers hand out what this rank has, to be saved, instead of all there is."""
    changed = list(optimizer.chained_optimizers)
    for one in changed:
        one.sharded_param_state_fully_reshardable = partial(_share, one)
    try:
        yield
    finally:
        for one in changed:
            del one.sharded_param_state_fully_reshardable


def _share(
    optimizer: Any,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[int, Any]:
    """What the method of the optimizer gives: number of a parameter -> its sharded tensors; to be
    saved, a factory of them that another process can apply."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    if is_loading:
        method = type(optimizer).sharded_param_state_fully_reshardable
        state: dict[int, Any] = method(optimizer, model_sharded_state_dict, is_loading, metadata)
        return state
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_param = {entry.data: entry for entry in nested_values(sharded)}
    ranges = {
        param: (where["param"].start, where["param"].end)
        for buffer in optimizer.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for param, where in bucket["param_map"].items()
    }
    params = [p for buffer in optimizer.buffers for p in buffer.param_index_map]
    return {
        number: _factory(optimizer, of_param[param], param, *ranges[param])
        for number, param in enumerate(params)
        if param in ranges
    }


def _factory(optimizer: Any, entry: Any, param: Any, start: int, end: int) -> Any:
    """A factory of what there is of the elements start to end of a parameter.

    Args:
        entry: says how the parameter is sharded.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    state = optimizer._get_main_param_and_optimizer_states(param)
    keys = ("param", *optimizer.optimizer_state_keys)
    shares = {key: state[key].detach() for key in keys}
    ranges = [(part, max(start, a) - a, min(end, b) - a) for part, a, b in _parts(entry)]
    instance = optimizer.distributed_optimizer_instance_id
    pieces = partial(_pieces, ranges=ranges, instance=instance)
    return ShardedTensorFactory(entry.key, shares, pieces, _never_merged)


def _pieces(
    key: str, shares: dict[str, torch.Tensor], *_: Any, ranges: list[Any], instance: int
) -> dict[str, Any]:
    """Weight in FP32 and moments of some elements of a parameter, as sharded tensors.

    Args:
        key: of the parameter.
        shares: the elements, in order, by what they are.
        ranges: the sharded tensors of the parameter, and the range of each that the elements are.
        instance: number of the optimizer among those whose ranks have the same.
    """
    flat = {kind: share.float().view(-1) for kind, share in shares.items()}
    found, at = {}, 0
    for part, start, end in ranges:
        # Of ranks that have the same of a parameter, one in each dimension writes it: those of data
        # parallelism have different ranges.
        replica = (*part.replica_id[:-1], instance)
        for i, box in enumerate(boxes(part.local_shape, start, end)):
            begin, at = at, at + math.prod(box.sizes)
            for kind, elements in flat.items():
                name = f"optimizer.state.{kind}.{part.key}"
                found[f"{name}.{i}"] = _piece(part, name, box, elements[begin:at], replica)
    return found


def _never_merged(*_: Any) -> Any:
    """Megatron's own sharded tensors are loaded."""
    raise NotImplementedError


def _parts(entry: Any) -> list[tuple[Any, int, int]]:
    """The sharded tensors a parameter is saved as, each with the range of the parameter's elements
    that it is: Mamba's projections are several."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    size = entry.data.numel()
    if isinstance(entry, ShardedTensor):
        return [(entry, 0, size)]
    holder = {"entry": replace(entry, data=entry.data.detach().to("meta"))}  # without memory
    apply_factories(holder)
    parts, end = [], 0
    for part in sorted(nested_values(holder), key=lambda part: part.data.storage_offset()):
        assert part.data.storage_offset() == end and part.data.is_contiguous(), part
        start, end = end, end + part.data.numel()
        parts.append((replace(part, data=None), start, end))
    assert end == size, f"{entry.key} is not a row of parts"
    return parts


def _piece(part: Any, name: str, box: Box, flat: torch.Tensor, replica: tuple[int, ...]) -> Any:
    """A sharded tensor of its own place and size: Megatron's "uneven" sharding, which has no
    fragmentation, and no axes that the data does not have."""
    before = part.prepend_axis_num
    offset = [a + b for a, b in zip(part.global_offset[before:], box.offset, strict=True)]
    data = flat.view((1,) * before + box.sizes)
    return replace(
        part,
        key=name,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_offset=(*part.global_offset[:before], *offset),
        axis_fragmentations=None,
        replica_id=replica,
        prepend_axis_num=0,
    )
