"""Counts what each rank sends to others: bytes, calls and seconds, by purpose and by group.

Wraps the collectives of torch.distributed once, before the first megatron import (Megatron
takes some of them by value), on NCCL and gloo alike. wire.md has the convention of each
collective. What a collective is for is known from its process group, whose name Megatron gives
it; from the function that asks for it where one group serves several purposes (`Wire.purpose`);
and in the backward pass from the forward pass it belongs to.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

DISPATCH, COMBINE, ROUTING = "expert_dispatch", "expert_combine", "expert_routing"
TENSOR, CONTEXT, PIPELINE = "tensor", "context", "pipeline"
GRADIENTS, PARAMETERS, OTHER = "gradients", "parameters", "other"
PURPOSES = (
    *(DISPATCH, COMBINE, ROUTING),
    *(TENSOR, CONTEXT, PIPELINE),
    *(GRADIENTS, PARAMETERS, OTHER),
)

_GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": ("tp", TENSOR),
    "CONTEXT_PARALLEL_GROUP": ("cp", CONTEXT),
    "PIPELINE_MODEL_PARALLEL_GROUP": ("pp", PIPELINE),
    "EMBEDDING_GROUP": ("embedding", GRADIENTS),
    "DATA_PARALLEL_GROUP": ("dp", GRADIENTS),
    "DATA_PARALLEL_GROUP_WITH_CP": ("dp_cp", GRADIENTS),
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": ("dp_cp", GRADIENTS),
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": ("tp_cp", OTHER),
    "EXPERT_DATA_PARALLEL_GROUP": ("edp", GRADIENTS),
    "EXPERT_MODEL_PARALLEL_GROUP": ("ep", ROUTING),
    "EXPERT_TENSOR_PARALLEL_GROUP": ("etp", ROUTING),
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": ("tp_ep", ROUTING),
}
"""Megatron's description of a group (parallel_state) -> its name here and what it is for when
nobody says more. Any other group is `rest`, and other."""

GROUPS = (*dict.fromkeys(name for name, _ in _GROUPS.values()), "rest")

_NO_PURPOSE = ("rest", OTHER)


@dataclass
class Count:
    """What one rank did for one purpose."""

    bytes: int = 0
    """Sent to other ranks."""
    operand_bytes: int = 0
    """Of the tensors given to the collectives, the part that stays on the rank included."""
    calls: int = 0
    seconds: float = 0.0
    """In the calls and in waiting for those that run in the background."""


class Kind(NamedTuple):
    """One entry of the table: who asked for what."""

    purpose: str
    group: str
    collective: str
    backward: bool
    """Inside autograd's backward pass; forward passes that are run again there included."""


class Wire:
    """The counts of this process since the last `take`."""

    def __init__(self) -> None:
        self._counts: dict[Kind, Count] = {}
        # CUDA runs the backward pass in a thread of its own.
        self._here = threading.local()
        self._running: list[tuple[Count, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def purpose(self, name: str | None, tokens: torch.Tensor | None = None) -> Iterator[None]:
        """Collectives inside are for this purpose whatever their group; None: the group says.

        Args:
            tokens: in a dispatcher, the activations that are its purpose: what else it sends
                (probabilities, numbers of tokens) is routing.
        """
        here = self._here
        before = getattr(here, "purpose", None), getattr(here, "tokens", None)
        here.purpose, here.tokens = name, None if tokens is None else tokens.data_ptr()
        try:
            yield
        finally:
            here.purpose, here.tokens = before

    def current(self, source: torch.Tensor) -> str | None:
        """The purpose that was said for a collective on this tensor."""
        tokens = getattr(self._here, "tokens", None)
        if tokens is not None and source.data_ptr() != tokens:
            return ROUTING
        return getattr(self._here, "purpose", None)

    def take(self) -> dict[Kind, Count]:
        """The counts since the last call, and begin anew."""
        for count, start, end in self._running:
            end.synchronize()
            count.seconds += start.elapsed_time(end) / 1e3
        self._running.clear()
        taken, self._counts = self._counts, {}
        return taken

    def _count(self, kind: Kind) -> Count:
        count = self._counts.get(kind)
        if count is None:
            count = self._counts[kind] = Count()
        return count

    def _timed(self, count: Count, on_gpu: bool, call: Callable[[], Any]) -> Any:
        """Run `call`, its time added to `count`: on a GPU that of the stream, known later."""
        if not on_gpu:
            started = time.perf_counter()
            result = call()
            count.seconds += time.perf_counter() - started
            return result
        if torch.cuda.is_current_stream_capturing():  # replays of a graph are not seen at all
            return call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        self._running.append((count, start, end))
        return result


class _Handle:
    """A collective in the background, as torch.distributed returns it; waiting is timed."""

    def __init__(self, work: Any, wait: Callable[[Callable[[], Any]], Any]) -> None:
        self._work = work
        self._wait = wait

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._wait(lambda: self._work.wait(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _size(source: Any) -> int:
    """Bytes of a tensor or of a list of tensors."""
    if isinstance(source, torch.Tensor):
        return source.numel() * source.element_size()
    return sum(_size(tensor) for tensor in source)


class _Call(NamedTuple):
    """One call of a collective."""

    source: Any
    """What this rank gives: a tensor or a list of them."""
    group: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def argument(self, position: int, name: str) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    def is_root(self, position: int, name: str) -> bool:
        """Whether this rank is the root, given as a global rank or as `group_...`."""
        root = self.kwargs.get(f"group_{name}")
        if root is None:
            root = self.argument(position, name) or 0
            return bool(dist.get_rank() == root)
        return bool(self.group.rank() == root)


def _all_reduce(call: _Call) -> int:
    n = call.group.size()
    return 2 * (n - 1) * _size(call.source) // n


def _all_gather(call: _Call) -> int:
    return (call.group.size() - 1) * _size(call.source)


def _reduce_scatter(call: _Call) -> int:
    n = call.group.size()
    if isinstance(call.source, torch.Tensor):
        return (n - 1) * _size(call.source) // n
    return _size(call.source) - _size(call.source[call.group.rank()])


def _all_to_all_single(call: _Call) -> int:
    splits, whole, n = call.argument(3, "input_split_sizes"), _size(call.source), call.group.size()
    if splits is None or len(splits) == 0:
        return (n - 1) * whole // n
    rows = call.source.shape[0]
    kept = int(splits[call.group.rank()])
    return whole // rows * (rows - kept) if rows else 0


def _all_to_all(call: _Call) -> int:
    return _size(call.source) - _size(call.source[call.group.rank()])


def _broadcast(call: _Call) -> int:
    return (call.group.size() - 1) * _size(call.source) if call.is_root(1, "src") else 0


def _reduce(call: _Call) -> int:
    return 0 if call.is_root(1, "dst") else _size(call.source)


def _gather(call: _Call) -> int:
    return 0 if call.is_root(2, "dst") else _size(call.source)


def _scatter(call: _Call) -> int:
    return (call.group.size() - 1) * _size(call.source) if call.is_root(2, "src") else 0


def _send(call: _Call) -> int:
    return _size(call.source)


class _Collective(NamedTuple):
    source: tuple[int, str]
    """Position and name of what this rank gives."""
    group: int
    """Position of the group."""
    sent: Callable[[_Call], int]
    """Bytes this rank sends to others."""
    gathers: bool = False
    """In a data-parallel group: of parameters; otherwise of gradients."""


_COLLECTIVES = {
    "all_reduce": _Collective((0, "tensor"), 2, _all_reduce),
    "all_gather": _Collective((1, "tensor"), 2, _all_gather, gathers=True),
    "all_gather_single": _Collective((1, "input_tensor"), 2, _all_gather, gathers=True),
    "all_gather_into_tensor": _Collective((1, "input_tensor"), 2, _all_gather, gathers=True),
    "reduce_scatter": _Collective((1, "input_list"), 3, _reduce_scatter),
    "reduce_scatter_single": _Collective((1, "input"), 3, _reduce_scatter),
    "reduce_scatter_tensor": _Collective((1, "input"), 3, _reduce_scatter),
    "all_to_all_single": _Collective((1, "input"), 4, _all_to_all_single),
    "all_to_all": _Collective((1, "input_tensor_list"), 2, _all_to_all),
    "broadcast": _Collective((0, "tensor"), 2, _broadcast, gathers=True),
    "reduce": _Collective((0, "tensor"), 3, _reduce),
    "gather": _Collective((0, "tensor"), 3, _gather, gathers=True),
    "scatter": _Collective((0, "tensor"), 3, _scatter),
    "send": _Collective((0, "tensor"), 2, _send),
    "isend": _Collective((0, "tensor"), 2, _send),
}


def install() -> Wire:
    """Count the collectives of this process from now on. Calls after the first return the same
    counter. Must run before megatron takes the functions by value, and after `solo.install`."""
    installed = getattr(dist.all_reduce, "wire", None)
    if installed is not None:
        return installed
    wire = Wire()
    for name, collective in _COLLECTIVES.items():
        # torch looks some of its own functions up in the module that defines them, and compares
        # isend by identity: both names must be the same object where they were.
        counted: dict[int, Callable[..., Any]] = {}
        for module in (dist, distributed_c10d):
            function = getattr(module, name, None)
            if function is None:  # an older torch
                continue
            if id(function) not in counted:
                counted[id(function)] = _counted(wire, name, collective, function)
            setattr(module, name, counted[id(function)])
    coalescing = _timed_coalescing(wire, distributed_c10d._coalescing_manager)
    for module in (dist, distributed_c10d):
        module._coalescing_manager = coalescing  # type: ignore[attr-defined]
    return wire


def _timed_coalescing(wire: Wire, manager: Callable[..., Any]) -> Callable[..., Any]:
    """Collectives inside run together when the context ends: their time is that of the last."""

    @contextmanager
    def coalescing(*args: Any, **kwargs: Any) -> Iterator[Any]:
        wire._here.last = None
        with ExitStack() as stack:
            works = stack.enter_context(manager(*args, **kwargs))
            yield works
            if wire._here.last is not None:
                count, on_gpu = wire._here.last
                timed = functools.partial(wire._timed, count, on_gpu)
                timed(stack.close)
                works.wait = functools.partial(timed, works.wait)

    return coalescing


def _counted(
    wire: Wire, name: str, collective: _Collective, function: Callable[..., Any]
) -> Callable[..., Any]:
    here = wire._here

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(here, "inside", False):  # torch builds some collectives of others
            return function(*args, **kwargs)
        position = collective.group
        group = args[position] if len(args) > position else kwargs.get("group")
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup) or group.size() == 1:
            return function(*args, **kwargs)
        position, key = collective.source
        source = args[position] if len(args) > position else kwargs[key]
        first = source if isinstance(source, torch.Tensor) else source[0]
        short, purpose = _GROUPS.get(group.group_desc, _NO_PURPOSE)
        said = wire.current(first)
        if said is not None:
            purpose = said
        elif purpose == GRADIENTS:
            purpose = _data_parallel(collective, first)
        elif collective.sent is _send and purpose == OTHER:
            purpose = _between(_Call(source, group, args, kwargs))
        count = wire._count(Kind(purpose, short, name, torch._C._current_graph_task_id() != -1))
        count.bytes += collective.sent(_Call(source, group, args, kwargs))
        count.operand_bytes += _size(source)
        count.calls += 1
        timed = functools.partial(wire._timed, count, first.is_cuda)
        here.last = count, first.is_cuda
        here.inside = True
        try:
            result = timed(lambda: function(*args, **kwargs))
        finally:
            here.inside = False
        return result if result is None else _Handle(result, timed)

    call.wire = wire  # type: ignore[attr-defined]
    return call


def _between(send: _Call) -> str:
    """What a send outside of a group of its own is for. Megatron shifts labels for multi-token
    prediction so, and, in pipelines of two ranks, every other activation."""
    from megatron.core import parallel_state

    peer = send.argument(1, "dst")
    if peer is None:
        peer = dist.get_global_rank(send.group, send.kwargs["group_dst"])
    stages = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if stages is not None and peer in dist.get_process_group_ranks(stages):
        return PIPELINE
    return CONTEXT


def _data_parallel(collective: _Collective, tensor: torch.Tensor) -> str:
    """Data-parallel ranks gather parameters and reduce gradients; whole numbers are counters."""
    if not tensor.is_floating_point() and tensor.dtype != torch.uint8:
        return OTHER
    return PARAMETERS if collective.gathers else GRADIENTS


def watch_experts(wire: Wire) -> None:
    """Tell dispatch, combine and routing apart, forward and backward. Imports megatron; does
    nothing the second time."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    if hasattr(mappings._AllToAll, "wire"):
        return
    for dispatcher in (
        token_dispatcher.MoEAlltoAllTokenDispatcher,
        token_dispatcher.MoEAllGatherTokenDispatcher,
    ):
        for name in ("token_dispatch", "dispatch_postprocess"):
            setattr(dispatcher, name, _dispatches(wire, getattr(dispatcher, name)))
        for name in ("combine_preprocess", "token_combine"):
            setattr(dispatcher, name, _combines(wire, getattr(dispatcher, name)))
    _remember(wire, mappings._AllToAll, 1)
    _remember(wire, mappings._GatherFromSequenceParallelRegion, 0)
    _remember(wire, mappings._ReduceScatterToSequenceParallelRegion, 0)


def _dispatches(wire: Wire, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with wire.purpose(DISPATCH, tokens=hidden_states):
            return method(self, hidden_states, *args, **kwargs)

    return call


def _combines(wire: Wire, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with wire.purpose(COMBINE):
            return method(*args, **kwargs)

    return call


def _remember(wire: Wire, function: Any, source: int) -> None:
    """Give the collective of an autograd function's backward pass the purpose its forward pass
    had. `source` is the position of its tensor."""
    forward, backward = function.forward, function.backward

    def remembering(ctx: Any, *args: Any) -> Any:
        ctx.wire_purpose = wire.current(args[source])
        with wire.purpose(ctx.wire_purpose):
            return forward(ctx, *args)

    def remembered(ctx: Any, *gradients: Any) -> Any:
        with wire.purpose(ctx.wire_purpose):
            return backward(ctx, *gradients)

    function.forward, function.backward = staticmethod(remembering), staticmethod(remembered)
    function.wire = wire


def summary(
    counts: dict[Kind, Count],
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Counts of all ranks by purpose, for the metrics; every rank must call it.

    Returns:
        purpose -> bytes, backward_bytes (part of bytes), operand_bytes, calls, and groups: bytes
        and calls by group, all summed over ranks; and purpose -> group -> seconds, mean over
        ranks. What was not called is left out.
    """
    table = torch.zeros(len(PURPOSES), len(GROUPS), 5, dtype=torch.float64)
    for kind, count in counts.items():
        row = table[PURPOSES.index(kind.purpose), GROUPS.index(kind.group)]
        backward = count.bytes * kind.backward
        row += torch.tensor(
            [count.bytes, backward, count.operand_bytes, count.calls, count.seconds],
            dtype=torch.float64,
        )
    world = dist.get_world_size()
    if world > 1:
        table = table.to(torch.cuda.current_device())
        dist.all_reduce(table)
    amounts: dict[str, dict[str, Any]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for purpose, rows in zip(PURPOSES, table.tolist(), strict=True):
        called = {g: row for g, row in zip(GROUPS, rows, strict=True) if row[3]}
        if not called:
            continue
        sums = [int(sum(column)) for column in zip(*called.values(), strict=True)]
        amounts[purpose] = {
            "bytes": sums[0],
            "backward_bytes": sums[1],
            "operand_bytes": sums[2],
            "calls": sums[3],
            "groups": {g: {"bytes": int(r[0]), "calls": int(r[3])} for g, r in called.items()},
        }
        seconds[purpose] = {g: row[4] / world for g, row in called.items()}
    return amounts, seconds
