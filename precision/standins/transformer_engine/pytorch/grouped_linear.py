"""GroupedLinear: one product an expert on consecutive rows of one input.

Shapes: x_ti is [tokens, in_features], the first m_splits[0] rows belong to expert 0 and so
on; y_to is [tokens, out_features]. Experts are split over ranks by Megatron-Core, so no
collective runs here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .comm import Group
from .module import InitMethod, refuse
from .quantized import QuantizedProducts
from .quantized_module import QuantizedModule

_ALIGN = 64
"""Row counts of BF16 products on a CPU are rounded up to this. oneDNN compiles a kernel for
each new shape, and the tokens of an expert are a new number every time: measured 0.7 ms a
product instead of 0.07."""


def _aligned(x: Tensor, rows: int) -> int:
    return -(-rows // _ALIGN) * _ALIGN if x.dtype == torch.bfloat16 and x.is_cpu else rows


def _window(x: Tensor, start: int, rows: int) -> Tensor:
    """`rows` rows of x from `start`; zeros past its end."""
    missing = start + rows - x.shape[0]
    return F.pad(x[start:], (0, 0, 0, missing)) if missing > 0 else x[start : start + rows]


def _products(x: Tensor, splits: Sequence[int], matrices: Sequence[Tensor]) -> Tensor:
    """x_ti and one [i, o] matrix an expert -> y_to.

    A product of more rows than its expert has spills into the rows of the next one, which
    come after it and overwrite them; the last spills into rows that are cut off.
    """
    y = x.new_empty(x.shape[0] + _ALIGN, matrices[0].shape[1])
    start = 0
    for count, matrix in zip(splits, matrices, strict=True):
        if count:
            rows = _aligned(x, count)
            torch.mm(_window(x, start, rows), matrix, out=y[start : start + rows])
            start += count
    return y[: x.shape[0]]


class _GroupedProduct(torch.autograd.Function):
    """One matrix product an expert, written straight into its rows of the result: no copy of
    the tokens or the weights, no autograd node an expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: Sequence[int], *weights: Tensor) -> Tensor:
        ctx.splits = splits
        ctx.save_for_backward(x, *weights)
        return _products(x, splits, [w.t() for w in weights])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        dx = _products(grad, ctx.splits, weights) if ctx.needs_input_grad[0] else None
        dw: list[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[2:]):
            # One allocation for all experts; an expert without tokens gets zeros.
            stacked = x.new_zeros(len(weights), *weights[0].shape)
            start = 0
            for count, part in zip(ctx.splits, stacked, strict=True):
                if count:
                    # This product sums over the rows, so both factors end in zeros: rows of
                    # the next expert would cost nothing only while they are finite.
                    padding = (0, 0, 0, _aligned(x, count) - count)
                    own, inputs = (F.pad(t[start : start + count], padding) for t in (grad, x))
                    torch.mm(own.t(), inputs, out=part)
                    start += count
            dw = list(stacked.unbind(0))
        return dx, None, *dw


class GroupedLinear(QuantizedModule):
    """Mirrors `transformer_engine.pytorch.GroupedLinear` (parameters weight0, weight1, ...)."""

    module_type = "grouped_linear"

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Group | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cpu",
        ub_name: str | None = None,
        name: str | None = None,
        save_original_input: bool = False,
        **unsupported: Any,
    ) -> None:
        refuse(
            "GroupedLinear",
            bias=bias,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            tp_size=tp_size if tp_size > 1 else None,
            **unsupported,
        )
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
        self.num_gemms = num_gemms
        self.single_grouped_weight = self.single_grouped_bias = False
        for i in range(num_gemms):
            self.add_weight(f"weight{i}")

    def forward(
        self, inp: Tensor, m_splits: Sequence[int] | Tensor, is_first_microbatch: bool | None = None
    ) -> Tensor | tuple[Tensor, None]:
        """x_ti -> y_to; m_splits gives the rows of each expert and sums to the rows of x."""
        splits = m_splits.tolist() if isinstance(m_splits, Tensor) else list(m_splits)
        if sum(splits) != inp.shape[0]:
            raise ValueError(
                f"m_splits={splits} sums to {sum(splits)}, but the input has {inp.shape[0]} rows"
            )
        names = [f"weight{i}" for i in range(self.num_gemms)]
        weights = [getattr(self, name) for name in names]
        plan = self.plan(inp, names, is_first_microbatch, splits)
        if plan is not None:
            y = QuantizedProducts.apply(inp, plan, *weights)
        else:
            y = _GroupedProduct.apply(inp, splits, *weights)
        return (y, None) if self.return_bias else y
