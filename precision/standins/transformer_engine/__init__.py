"""Plain-PyTorch stand-in for NVIDIA Transformer Engine at its public API.

Found on sys.path only where the real library is missing, so that Megatron-Core's own
classes run unmodified on any device. What it does not implement raises
NotImplementedError and names the argument. Parameter names are the real library's, so
checkpoints are the same with either.
"""

from . import common, pytorch

__version__ = "2.20.0"
"""The release whose API is mirrored; Megatron-Core gates features on it."""

__strata_standin__ = True

__all__ = ["common", "pytorch"]
