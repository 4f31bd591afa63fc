"""Which device a run uses."""

from collections.abc import Iterator
from contextlib import contextmanager

from recipes.errors import ConfigError


def choose_device(device: str) -> str:
    """Turn `device: auto | cuda | host` into "cuda" or "host".

    Raises:
        ConfigError: an unknown name, or cuda without a GPU.
    """
    import torch

    if device not in ("auto", "cuda", "host"):
        raise ConfigError(f"device={device} is not a device; use auto, cuda or host")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device=cuda, but torch sees no CUDA GPU here; use device=host")
    return "cuda" if available and device != "host" else "host"


@contextmanager
def meta_device() -> Iterator[None]:
    """Everything Megatron allocates on "the current CUDA device" inside has a shape but no
    storage, so that models of any size can be counted on any machine."""
    import torch

    current = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = current
