"""Stand-in for mamba-ssm 2.3.2 (and causal-conv1d 1.7.0) where they are not installed.

Megatron's `MambaMixer` imports the functions and the norm below by mamba-ssm's public names.
`install` registers them there, in plain PyTorch with the same meaning, gradients and packed
documents. Whatever is not implemented raises `NotImplementedError` naming the argument.

Shape legend: b batch, l time, h head, p head channel, g group, n state, w tap.
"""

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.causal_conv import CausalConv
from model.gated_norm import Gate, group_rms_norm
from model.mamba_functions import Sizes, SplitConvScan, chunk_scan, time_step
from model.tiling import accumulation_dtype

MAMBA_SSM_VERSION = "2.3.2"
"""The mamba-ssm release whose API this mirrors."""

CAUSAL_CONV1D_VERSION = "1.7.0"
"""The causal-conv1d release whose API this mirrors."""


def install() -> tuple[str, str]:
    """Register the stand-ins unless mamba-ssm is installed. Does nothing the second time.

    causal-conv1d, which Megatron asks for when documents are packed, is registered with
    mamba-ssm unless it is installed itself.

    Returns:
        ("real" | "stand-in", version), for the start-up table.

    Raises:
        RuntimeError: Megatron's mixer was imported before and has settled for "missing".
    """
    if importlib.util.find_spec("mamba_ssm") is None:
        if "megatron.core.ssm.mamba_mixer" in sys.modules:
            raise RuntimeError(
                "the mamba_ssm stand-in must be installed before megatron is imported"
            )
        sys.modules.update(_mamba_ssm_modules())
        if importlib.util.find_spec("causal_conv1d") is None:
            sys.modules.update(_causal_conv1d_modules())
    if getattr(sys.modules.get("mamba_ssm"), "__strata_standin__", False):
        return "stand-in", MAMBA_SSM_VERSION
    return "real", importlib.metadata.version("mamba_ssm")


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The Mamba-2 scan, gated by silu(z) if z is given.

    Args:
        x: [b, l, h, p].
        dt: [b, l, h], before bias, softplus and clamp to `dt_limit`.
        A: [h], negative.
        B: [b, l, g, n].
        C: [b, l, g, n].
        chunk_size: any positive number; the result does not depend on it.
        D: [h] or None.
        z: [b, l, h, p] or None.
        dt_bias: [h] or None.
        initial_states: [b, h, p, n] or None; with `seq_idx` it belongs to document 0.
        seq_idx: [b, l] document of each token (>= 0) or None.
        cu_seqlens: not implemented.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: bounds of the step, the lower one >= 0.
        return_final_states: also return the state after the last token.
        return_varlen_states: not implemented.

    Returns:
        [b, l, h, p] in x's dtype; with `return_final_states` also [b, h, p, n] in float32.
    """
    _refuse("cu_seqlens", cu_seqlens is not None)
    _refuse("return_varlen_states", return_varlen_states)
    _check_scan(chunk_size, D, seq_idx, dt_limit)
    step = time_step(dt, dt_bias, dt_softplus, dt_limit)
    y, final = chunk_scan(x, step, A, B, C, D, z, initial_states, seq_idx)
    return (y, final) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer after its input projection: convolution, scan, gate, maybe norm and output.

    Without `rmsnorm_weight` the result is scan * silu(z); with it the gate goes with the norm,
    as `norm_before_gate` says.

    Args:
        zxbcdt: [b, l, 2 h p + 2 g n + h], packed as z, x, B, C, dt.
        conv1d_weight: [h p + 2 g n, w], oldest tap first.
        conv1d_bias: [h p + 2 g n] or None.
        dt_bias: [h].
        A: [h], negative.
        D: [h].
        chunk_size: any positive number; the result does not depend on it.
        initial_states: [b, h, p, n] or None; with `seq_idx` it belongs to document 0.
        seq_idx: [b, l] document of each token (>= 0) or None.
        dt_limit: bounds of softplus(dt + dt_bias), the lower one >= 0.
        return_final_states: also return the state after the last token.
        activation: "silu", "swish" or None, after the convolution.
        rmsnorm_weight: [h p] or None; groups of h p / g channels.
        rmsnorm_eps: added to the mean square.
        outproj_weight: [d, h p] or None.
        outproj_bias: [d] or None.
        headdim: p.
        ngroups: g.
        norm_before_gate: norm(y) * silu(z) if true, else norm(y * silu(z)).

    Returns:
        [b, l, h p], or [b, l, d] with `outproj_weight`, in zxbcdt's dtype; with
        `return_final_states` also [b, h, p, n] in float32.
    """
    _check_scan(chunk_size, D, seq_idx, dt_limit)
    silu = _is_silu(activation)
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("outproj_bias needs outproj_weight; give both or neither")
    sizes = _sizes(zxbcdt, conv1d_weight, D, headdim, ngroups)
    gated = rmsnorm_weight is None
    arguments = (zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, initial_states, seq_idx)
    y, final = SplitConvScan.apply(*arguments, sizes, dt_limit, silu, gated)
    if rmsnorm_weight is not None:
        z = zxbcdt[..., : sizes.inner]
        group_size = sizes.inner // ngroups
        y = gated_rms_norm(y, rmsnorm_weight, z, rmsnorm_eps, group_size, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def gated_rms_norm(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """norm(x), norm(x) * silu(z) or norm(x * silu(z)) over groups of channels, in x's dtype."""
    if z is None:
        return group_rms_norm(x, weight, eps, group_size)
    shape = (1, -1, x.shape[-1])
    y, gate = x.reshape(shape).to(accumulation_dtype(x)), z.reshape(shape)
    if norm_before_gate:
        y = Gate.apply(group_rms_norm(y, weight, eps, group_size), gate)
    else:
        y = group_rms_norm(Gate.apply(y, gate), weight, eps, group_size)
    return y.view(x.shape).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm over groups of channels, with an optional SiLU gate.

    Args:
        hidden_size: channels.
        eps: added to the mean square.
        group_size: channels normalised together; None for all of them.
        norm_before_gate: norm(x) * silu(z) if true, else norm(x * silu(z)).
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and hidden_size % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide hidden_size={hidden_size}; choose a "
                "divisor, or None for one group"
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one, as the library does."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        group_size = self.group_size or self.weight.numel()
        return gated_rms_norm(x, self.weight, z, self.eps, group_size, self.norm_before_gate)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """causal-conv1d's convolution of x [b, channel, l] with weight [channel, w]."""
    _refuse("initial_states", initial_states is not None)
    _refuse("return_final_states", return_final_states)
    _refuse("final_states_out", final_states_out is not None)
    _check_documents(seq_idx)
    silu = _is_silu(activation)
    return CausalConv.apply(x.transpose(1, 2), weight, bias, seq_idx, silu).transpose(1, 2)


def causal_conv1d_varlen_states(*args: Any, **kwargs: Any) -> Tensor:
    """Imported with `causal_conv1d_fn`, called only by dynamic inference: not implemented."""
    raise NotImplementedError("causal_conv1d_varlen_states is not implemented by this stand-in")


def _check_scan(
    chunk_size: int, D: Tensor | None, seq_idx: Tensor | None, dt_limit: tuple[float, float]
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    _refuse("D of shape [heads, head_dim]", D is not None and D.dim() == 2)
    _refuse(f"dt_limit={dt_limit} with a negative bound", dt_limit[0] < 0)
    _refuse("autocast", torch.is_autocast_enabled("cpu"))
    _check_documents(seq_idx)


def _check_documents(seq_idx: Tensor | None) -> None:
    """causal-conv1d takes negative document numbers for padding."""
    _refuse("seq_idx below zero", seq_idx is not None and bool((seq_idx < 0).any()))


def _is_silu(activation: str | None) -> bool:
    _refuse(f"activation={activation!r}", activation not in (None, "silu", "swish"))
    return activation is not None


def _sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, D: Tensor, headdim: int | None, ngroups: int
) -> Sizes:
    """Sizes from the shapes, checked: a wrong one would read z as x without a sign."""
    if headdim is None:
        raise ValueError("headdim=None: the head size must be given when D is [heads]")
    heads = D.shape[0]
    if heads % ngroups:
        raise ValueError(f"ngroups={ngroups} must divide the number of heads, {heads}")
    state_dim, rest = divmod(conv1d_weight.shape[0] - heads * headdim, 2 * ngroups)
    if rest or state_dim < 1:
        raise ValueError(
            f"conv1d_weight has {conv1d_weight.shape[0]} channels, which is not heads * headdim + "
            f"2 * ngroups * state for heads={heads}, headdim={headdim}, ngroups={ngroups}"
        )
    sizes = Sizes(heads, headdim, ngroups, state_dim)
    width = 2 * sizes.inner + 2 * sizes.grouped + heads
    _refuse(f"zxbcdt wider than {width} (a gated MLP beside the scan)", zxbcdt.shape[-1] > width)
    if zxbcdt.shape[-1] < width:
        raise ValueError(f"zxbcdt is {zxbcdt.shape[-1]} wide; [z x B C dt] needs {width}")
    return sizes


def _refuse(what: str, given: bool) -> None:
    if given:
        raise NotImplementedError(f"{what} is not implemented by the mamba_ssm stand-in")


def _mamba_ssm_modules() -> dict[str, ModuleType]:
    scan = _module(
        "mamba_ssm.ops.triton.ssd_combined",
        mamba_chunk_scan_combined=mamba_chunk_scan_combined,
        mamba_split_conv1d_scan_combined=mamba_split_conv1d_scan_combined,
    )
    norm = _module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=RMSNorm)
    triton = _module(
        "mamba_ssm.ops.triton", is_package=True, ssd_combined=scan, layernorm_gated=norm
    )
    ops = _module("mamba_ssm.ops", is_package=True, triton=triton)
    package = _module(
        "mamba_ssm",
        is_package=True,
        ops=ops,
        __version__=MAMBA_SSM_VERSION,
        __strata_standin__=True,
    )
    return {module.__name__: module for module in (package, ops, triton, scan, norm)}


def _causal_conv1d_modules() -> dict[str, ModuleType]:
    varlen = _module(
        "causal_conv1d.causal_conv1d_varlen",
        causal_conv1d_varlen_states=causal_conv1d_varlen_states,
    )
    package = _module(
        "causal_conv1d",
        is_package=True,
        causal_conv1d_fn=causal_conv1d_fn,
        causal_conv1d_varlen=varlen,
        __version__=CAUSAL_CONV1D_VERSION,
        __strata_standin__=True,
    )
    return {module.__name__: module for module in (package, varlen)}


def _module(name: str, is_package: bool = False, **attributes: Any) -> ModuleType:
    """A module with what `importlib` and other libraries probe for."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None, is_package=is_package)
    module.__package__ = name if is_package else name.rpartition(".")[0]
    if is_package:
        module.__path__ = []
    vars(module).update(attributes)
    return module
