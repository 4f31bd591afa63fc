"""Puts every backend in place, once, before the first megatron import.

Each stand-in is installed only where the real thing is missing, each separately: a GPU
machine without Transformer Engine is fine. The table says what runs on what.
"""

import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from recipes.errors import ConfigError


@dataclass(frozen=True)
class Backend:
    """One line of the start-up table."""

    component: str
    kind: str
    """real, stand-in or absent."""
    version: str
    runs: str
    """What it runs here, in words."""


@dataclass(frozen=True)
class Backends:
    """What this process runs on."""

    device: str
    """cuda or host."""
    table: tuple[Backend, ...]

    @property
    def collectives(self) -> str:
        """Name of the torch.distributed backend."""
        return "nccl" if self.device == "cuda" else "gloo"

    def as_dicts(self) -> list[dict[str, str]]:
        """The table for environment.json."""
        return [asdict(row) for row in self.table]

    def __str__(self) -> str:
        rows = [("component", "is", "version", "runs")]
        rows += [(b.component, b.kind, b.version, b.runs) for b in self.table]
        widths = [max(len(r[i]) for r in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(r[i].ljust(widths[i]) for i in range(3)), r[3]]) for r in rows
        )


def install_backends(device: str = "auto", formats: Collection[str] = ()) -> Backends:
    """Choose the device and make every library Megatron-Core needs importable.

    Args:
        device: auto, cuda or host, as in the recipe.
        formats: number formats the run needs (nvfp4, mxfp8). On a GPU without one of them its
            emulation takes the place of an installed Transformer Engine, which would refuse.

    Raises:
        ConfigError: unknown device, no GPU where one was asked for, or PyPI's `apex` (an
            unrelated web toolkit that Megatron would take for NVIDIA's).
    """
    if device == "host":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is here must not be seen
    import torch

    from model.mamba_ssm_standin import install as install_mamba_ssm
    from parallel import cuda_runtime, embedding, solo, uneven, wire
    from parallel.device import choose_device
    from parallel.host_memory import keep_freed_memory
    from precision.backend import install_transformer_engine, needs_emulation

    chosen = choose_device(device)
    _refuse_foreign_apex()
    host = chosen == "host"
    if host:
        keep_freed_memory()
        cuda_runtime.install()
        embedding.install()
        solo.install()
        uneven.install()
    else:
        # Before anything asks the device: a rank must not open a context on another one's.
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        torch.cuda.set_device(int(local))
    counter = wire.install()
    emulated = [] if host else needs_emulation(formats, torch.cuda.get_device_capability())
    te_kind, te_version = install_transformer_engine(emulate=bool(emulated))
    mamba_kind, mamba_version = install_mamba_ssm()
    if host:
        _adapt_megatron_to_host()
    wire.watch_experts(counter)
    megatron = importlib.metadata.version("megatron-core")
    table = (
        Backend("megatron-core", "real", megatron, "model, parallelism, optimizer, checkpoints"),
        Backend("torch", "real", torch.__version__, "tensors and autograd"),
        Backend(
            "CUDA runtime",
            "stand-in" if host else "real",
            "-" if host else str(torch.version.cuda),
            "the CPU, in program order" if host else torch.cuda.get_device_name(),
        ),
        Backend("collectives", "real", torch.__version__, "gloo" if host else "nccl"),
        Backend("transformer_engine", te_kind, te_version, _te_runs(te_kind, emulated)),
        Backend("mamba_ssm", mamba_kind, mamba_version, _mamba_runs(mamba_kind)),
        _apex(),
    )
    return Backends(chosen, table)


def _te_runs(kind: str, emulated: Collection[str]) -> str:
    if kind == "real":
        return "linear layers, experts, attention, norms on the library's kernels"
    why = f" (this GPU has no {' and no '.join(emulated)})" if emulated else ""
    return (
        "linear layers, experts, attention (SDPA), norms in PyTorch; NVFP4 and MXFP8 emulated" + why
    )


def _mamba_runs(kind: str) -> str:
    if kind == "real":
        return "scan, convolution and gated norm on the library's kernels"
    return "chunked scan, convolution and gated norm in PyTorch"


def _apex() -> Backend:
    if importlib.util.find_spec("apex") is None:
        return Backend(
            "apex", "absent", "-", "Transformer Engine's AdamW and multi-tensor code instead"
        )
    return Backend("apex", "real", "NVIDIA", "fused optimizer kernels")


def _refuse_foreign_apex() -> None:
    spec = importlib.util.find_spec("apex")
    if spec is not None and importlib.util.find_spec("apex.multi_tensor_apply") is None:
        raise ConfigError(
            "the installed package `apex` is not NVIDIA Apex but PyPI's web toolkit, which "
            "breaks Megatron-Core; run: pip uninstall apex"
        )


def _adapt_megatron_to_host() -> None:
    """Places where Megatron means "not on a GPU yet" but a host means "already there", and one
    where its GPU kernel is free but PyTorch copies every token."""
    import torch

    from parallel.fusion import fuse

    # Megatron decorates functions with torch.compile while it is imported, before its own
    # switch (disable_jit_fuser) can be reached.
    compile_function: Any = torch.compile
    torch.compile = fuse  # type: ignore[assignment]
    try:
        from megatron.core import jit

        jit.jit_fuser = fuse
    finally:
        torch.compile = compile_function
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def move_or_convert(
        tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            return tensor.numpy()
        return move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move_or_convert
    sort_chunks = token_dispatcher.sort_chunks_by_idxs

    def sort_unless_sorted(
        input: torch.Tensor,
        split_sizes: torch.Tensor,
        sorted_idxs: torch.Tensor,
        probs: torch.Tensor | None = None,
        fused: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        order = sorted_idxs.tolist()
        if order == sorted(order):  # always so with one expert-parallel rank
            return input, probs
        return sort_chunks(input, split_sizes, sorted_idxs, probs=probs, fused=fused)

    token_dispatcher.sort_chunks_by_idxs = sort_unless_sorted
    # A host has one generator where Megatron expects two; drawing from it inside a fork is
    # what must happen, so Megatron's warning about it says nothing here.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
