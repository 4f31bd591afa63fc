"""Stand-in for the CUDA runtime, so that Megatron-Core runs unmodified on a host.

Megatron asks torch.cuda for devices, streams, events and random states, writes
device="cuda" literally and tells FP16/BF16 parameters by the name of their CUDA tensor
type. On a host all of that means "the CPU, in program order". `torch.cuda.is_available()`
stays False: nothing else may take this machine for a GPU.

Installed once, before the first megatron import; never where CUDA is available.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FACTORIES = (
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like rand "
    "rand_like randint randn randn_like randperm scalar_tensor tensor zeros zeros_like"
).split()
_METHODS = "to new_empty new_full new_ones new_tensor new_zeros".split()


class Stream:
    """A CUDA stream on a host: work is done when the call returns."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Everything has run already."""

    def wait_stream(self, stream: Any) -> None:
        """Everything has run already."""

    def wait_event(self, event: Any) -> None:
        """Everything has run already."""

    def record_event(self, event: Any = None) -> "Event":
        """An event that has happened already."""
        return event or Event()

    def query(self) -> bool:
        """Whether all work is done."""
        return True


class Event:
    """A CUDA event on a host: it has happened when the call returns."""

    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        import time

        self._time = time.perf_counter()

    def synchronize(self) -> None:
        """It has happened already."""

    def wait(self, stream: Any = None) -> None:
        """It has happened already."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        assert self._time is not None and end._time is not None, "event was not recorded"
        return 1e3 * (end._time - self._time)


class _Generators:
    """`torch.cuda.default_generators` on a host: the one generator there is."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _on_host(device: Any) -> Any:
    """The CPU for a CUDA device, anything else unchanged."""
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its device= argument redirected to the host."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_host(kwargs["device"])
        return function(*args, **kwargs)

    return call


def _redirected_to(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.to with a CUDA device, positional or named, redirected to the host."""

    @functools.wraps(function)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], str | torch.device):
            args = (_on_host(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_host(kwargs["device"])
        return function(self, *args, **kwargs)

    return call


def _cuda_type_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type() that calls a host tensor by the CUDA name Megatron's optimizer expects."""

    @functools.wraps(function)
    def call(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return function(self, dtype, *args, **kwargs)
        name = function(self)
        return name.replace("torch.", "torch.cuda.", 1) if self.device.type == "cpu" else name

    return call


def _nothing() -> Callable[..., None]:
    """A new function that does nothing. Each name gets its own: torch.compile's tables map
    torch functions by identity and refuse one object under two names."""
    return lambda *args, **kwargs: None


def _no_context() -> Callable[..., Any]:
    """A new context manager that does nothing."""

    @contextmanager
    def context(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    return context


def is_installed() -> bool:
    """Whether `install` has run in this process."""
    return torch.cuda.Stream is Stream


def install() -> None:
    """Put the stand-in in place. Does nothing the second time.

    Raises:
        RuntimeError: CUDA is available, so the real runtime must be used.
    """
    if is_installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CUDA runtime stand-in must not replace a real CUDA runtime")
    cpu = torch.device("cpu")
    stream = Stream()
    cuda: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "default_generators": _Generators(),
        "current_device": lambda: cpu,
        "set_device": _nothing(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": _no_context(),
        "device": _no_context(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
        "is_current_stream_capturing": lambda: False,
        "_lazy_call": lambda callback, **kwargs: callback(),
        "_lazy_init": _nothing(),
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = cuda["get_rng_state"]
    torch.cuda.random.set_rng_state = cuda["set_rng_state"]
    torch.cuda.nvtx.range_push = _nothing()
    torch.cuda.nvtx.range_pop = _nothing()

    for name in _FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))
    for name in _METHODS:
        wrap = _redirected_to if name == "to" else _redirected
        setattr(torch.Tensor, name, wrap(getattr(torch.Tensor, name)))
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = _nothing()  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
