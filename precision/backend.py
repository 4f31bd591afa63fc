"""Makes `import transformer_engine` mean the real library, or the stand-in where it is
missing."""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from precision.policy import BLOCK

STANDINS = str(Path(__file__).with_name("standins"))


NATIVE = (10, 0), (12, 0)
"""Compute capability from which on, and up to which, both formats can be trained in (Blackwell).
From 12.0 on Transformer Engine 2.20 refuses MXFP8 (`_compute_mxfp8_support`), and there is no
instruction that rounds to E2M1 stochastically (PTX `cvt.rs`, of 10.0 and 10.3)."""


def needs_emulation(formats: Iterable[str], capability: tuple[int, int]) -> list[str]:
    """The formats that a GPU of this compute capability does not have, on which Transformer
    Engine would refuse them."""
    native = NATIVE[0] <= capability < NATIVE[1]
    return [] if native else sorted(f for f in set(formats) if f in BLOCK)


def is_installed() -> bool:
    """Whether the real Transformer Engine is; asked before the stand-in is registered."""
    return importlib.util.find_spec("transformer_engine") is not None


def install_transformer_engine(emulate: bool = False) -> tuple[str, str]:
    """Register the stand-in if the real Transformer Engine is not installed, or shall not be used.

    Args:
        emulate: take the stand-in although the library is there: its GPU lacks a format.

    Returns:
        ("real" | "stand-in", version), for the start-up table.
    """
    missing = not is_installed()
    if emulate and not missing and "transformer_engine" not in sys.modules:
        sys.path.insert(0, STANDINS)
        importlib.invalidate_caches()
    elif missing:
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
