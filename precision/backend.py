"""Makes `import transformer_engine` mean the real library, or the stand-in where it is
missing."""

import importlib
import importlib.util
import sys
from pathlib import Path

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
