"""Makes `import transformer_engine` mean the real library, or the stand-in where it is
missing."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

STANDINS = str(Path(__file__).with_name("standins"))


def install_transformer_engine() -> tuple[str, str]:
    """Register the stand-in if the real Transformer Engine is not installed.

    Returns:
        ("real" | "stand-in", version), for the start-up table.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        sys.path.append(STANDINS)  # at the end: an installed library always comes first
        importlib.invalidate_caches()
    module = importlib.import_module("transformer_engine")
    kind = "stand-in" if getattr(module, "__strata_standin__", False) else "real"
    return kind, str(getattr(module, "__version__", "unknown"))


def seed_rounding(seed: int) -> None:
    """Start the draws of stochastic rounding from `seed`, which should differ between ranks. The
    real library draws from the CUDA generator, which Megatron seeds."""
    if manager := _own_draws():
        manager.seed_stochastic_rounding(seed)


def rounding_state() -> dict[str, Any] | None:
    """Where the draws of stochastic rounding are, for a checkpoint; None with the real library,
    whose draws are part of the CUDA random state."""
    manager = _own_draws()
    return manager.get_stochastic_rounding_state() if manager else None


def set_rounding_state(state: dict[str, Any] | None) -> None:
    """Continue the draws where `rounding_state` was called."""
    manager = _own_draws()
    if manager and state is not None:
        manager.set_stochastic_rounding_state(state)


def _own_draws() -> Any:
    """The stand-in's state, which holds a generator of its own; None with the real library."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    return (
        FP8GlobalStateManager
        if hasattr(FP8GlobalStateManager, "seed_stochastic_rounding")
        else None
    )
