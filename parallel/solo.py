"""Collectives of one rank that have nothing to do, on a host.

NCCL sees that a group of one rank has its result already. Gloo copies a buffer that is reduced or
gathered in place to fresh memory and back (measured: a tenth of a step of the small model), and
hands everything to a thread of its own, which a forked process (train/forked.py) has not.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_SUM_LIKE = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.MIN)

Arguments = dict[str, Any]


class Done:
    """The handle of a collective that has ended."""

    def wait(self, timeout: Any = None) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """Whether it has ended."""
        return True


def install() -> None:
    """Let collectives whose result is there return at once in groups of one rank: reductions,
    gathers and reduce-scatters in place, broadcasts, barriers, and the gathers of small tensors
    that torch passes objects with.

    Does nothing the second time. Must run before megatron takes the functions by value.
    """
    if dist.barrier.__module__ == __name__:
        return
    for name, finish in _FINISH.items():
        function = _unless_alone(getattr(dist, name), finish)
        for module in (dist, distributed_c10d):  # torch's own functions find them in the latter
            setattr(module, name, function)


def _unless_alone(
    collective: Callable[..., Any], finish: Callable[[Arguments], bool]
) -> Callable[..., Any]:
    """A collective that in a group of one rank only finishes, where that is possible."""
    signature = inspect.signature(collective)
    place = list(signature.parameters).index("group")

    def call(*args: Any, **kwargs: Any) -> Any:
        group = args[place] if len(args) > place else kwargs.get("group")
        if dist.get_world_size(group) == 1:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            if finish(given.arguments):
                return Done() if given.arguments["async_op"] else None
        return collective(*args, **kwargs)

    call.__name__ = collective.__name__
    return call


def _nothing(given: Arguments) -> bool:
    return True


def _sums(given: Arguments) -> bool:
    """Whether the reduction of one part is the part."""
    return given["op"] in _SUM_LIKE


def _in_place(output: torch.Tensor, source: torch.Tensor) -> bool:
    """The result of one rank is where it should be."""
    return (
        output.data_ptr() == source.data_ptr()
        and output.numel() == source.numel()
        and output.dtype == source.dtype
    )


def _fill(parts: list[torch.Tensor] | None, tensor: torch.Tensor) -> bool:
    """Copy the one part; lists of anything else are errors, which are the library's to explain."""
    if parts is None or len(parts) != 1:
        return False
    if parts[0].shape != tensor.shape or parts[0].dtype != tensor.dtype:
        return False
    parts[0].copy_(tensor)
    return True


_FINISH: dict[str, Callable[[Arguments], bool]] = {
    "all_gather_into_tensor": lambda given: _in_place(
        given["output_tensor"], given["input_tensor"]
    ),
    "reduce_scatter_tensor": lambda given: (
        _sums(given) and _in_place(given["output"], given["input"])
    ),
    "all_reduce": _sums,
    "broadcast": _nothing,
    "barrier": _nothing,
    "all_gather": lambda given: _fill(given["tensor_list"], given["tensor"]),
    "gather": lambda given: _fill(given["gather_list"], given["tensor"]),
}
