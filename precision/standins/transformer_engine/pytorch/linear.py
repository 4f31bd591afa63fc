"""Linear and LayerNormLinear with the tensor and sequence parallelism of the real library.

Shapes: x_sbi is [sequence, batch, in_features] (any leading dimensions work without
sequence parallelism), y_sbo likewise with out_features; the weight is [out, in].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import comm
from .module import InitMethod, refuse
from .norm import rms_norm
from .quantized import QuantizedProducts
from .quantized_module import QuantizedModule


class _Product(torch.autograd.Function):
    """y = x W^T with the collectives of its parallel mode; the three products of a linear
    layer (forward, data gradient, weight gradient) stand in one place, in high precision; the
    quantized ones are in `quantized.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        mode: str | None,
        sequence_parallel: bool,
        group: comm.Group | None,
    ) -> Tensor:
        ctx.mode, ctx.sequence_parallel, ctx.group = mode, sequence_parallel, group
        ctx.save_for_backward(x, weight)
        full = comm.gather_sequence(x, group) if mode == "column" and sequence_parallel else x
        y = full @ weight.t()
        if mode == "row" and group is not None:
            y = (comm.reduce_scatter_sequence if sequence_parallel else comm.all_reduce)(y, group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mode, sequence_parallel, group = ctx.mode, ctx.sequence_parallel, ctx.group
        if mode == "row" and sequence_parallel:
            grad = comm.gather_sequence(grad, group)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = grad @ weight
            if mode == "column" and group is not None:
                reduce = comm.reduce_scatter_sequence if sequence_parallel else comm.all_reduce
                dx = reduce(dx, group)
        if ctx.needs_input_grad[1]:
            # The gathered input is not kept: like the real library, it is gathered again.
            full = comm.gather_sequence(x, group) if mode == "column" and sequence_parallel else x
            dw = grad.flatten(0, -2).t() @ full.flatten(0, -2)
        return dx, dw, None, None, None


class Linear(QuantizedModule):
    """y = x W^T + b, optionally split over tensor-parallel ranks.

    Mirrors `transformer_engine.pytorch.Linear`; arguments that would change what is
    computed and are not implemented raise NotImplementedError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: comm.Group | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cpu",
        rng_tracker_name: str | None = None,
        name: str | None = None,
        save_original_input: bool = False,
        **unsupported: Any,
    ) -> None:
        refuse("Linear", fuse_wgrad_accumulation=fuse_wgrad_accumulation, **unsupported)
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            tp_group=tp_group,
            tp_size=tp_size,
            parallel_mode=parallel_mode,
            params_dtype=params_dtype,
            device=device,
            init_method=init_method,
            get_rng_state_tracker=get_rng_state_tracker,
            rng_tracker_name=rng_tracker_name,
            bias=bias,
            return_bias=return_bias,
            name=name,
            save_original_input=save_original_input,
        )
        self.add_weight("weight")
        if bias:
            self.add_bias("bias")
        else:
            self.bias = None

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """x_sbi -> y_sbo, or (y_sbo, bias) when the caller adds the bias."""
        return self._project(inp, is_first_microbatch)

    def _project(
        self, x: Tensor, is_first_microbatch: bool | None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        plan = self.plan(x, ["weight"], is_first_microbatch)
        if plan is not None:
            y = QuantizedProducts.apply(x, plan, self.weight)
        else:
            group = self.tp_group if self.tp_size > 1 else None
            y = _Product.apply(x, self.weight, self.parallel_mode, self.sequence_parallel, group)
        if self.return_bias:
            return y, self.bias
        return y if self.bias is None else y + self.bias


class LayerNormLinear(Linear):
    """Linear on the normalised input; the norm's weight lives here as `layer_norm_weight`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cpu",
        params_dtype: torch.dtype | None = None,
        **linear: Any,
    ) -> None:
        refuse(
            "LayerNormLinear",
            return_layernorm_output=return_layernorm_output,
            zero_centered_gamma=zero_centered_gamma,
            normalization=normalization if normalization != "RMSNorm" else None,
        )
        super().__init__(
            in_features, out_features, device=device, params_dtype=params_dtype, **linear
        )
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(
            torch.ones(in_features, dtype=self.params_dtype, device=device)
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """x_sbi -> y_sbo of the normalised input."""
        normed = rms_norm(inp, self.layer_norm_weight, self.eps)
        return self._project(normed, is_first_microbatch)
