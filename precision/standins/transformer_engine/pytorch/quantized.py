"""The three products of a linear layer with quantized operands, for one weight or one an expert.

    y  = x w^T      x in blocks along the features,   w in blocks along its columns
    dx = g w        g in blocks along the features,   w in blocks along its rows
    dw = g^T x      g and x in blocks along the tokens (and transformed, if the recipe says so)

Shapes: x_ti [tokens, in], w [out, in], g_to [tokens, out]. With experts the tokens of expert e are
the e-th run of rows, and every expert's tensors have scales of their own.

With sequence parallelism a rank quantizes its own tokens, with tensor maxima shared over the
group, and the quantized values are gathered: like the real library, which therefore rounds each
gradient once, whoever uses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from precision.operand import Operand, product, scales

from . import comm
from .quantization import Quantizers
from .quantized_tensor import Casting, Quantizer

Observer = Callable[[str, Tensor, Tensor], None]
"""Called with a tensor's role, what was quantized, and the FP32 values it became, but not for what
was left as it is. Roles: "input", "weight", "grad_output"; with "_columnwise" appended for the
operand that has blocks along the rows, whose transform, if there is one, is what was quantized."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight's two operands (one, if its blocks are square), and what they were made of."""

    rowwise: Operand
    columnwise: Operand | None
    source: tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """All that the products need besides x and the weights.

    Attributes:
        weights: quantized weights, one an expert.
        gradients: whether a backward pass may follow.
        save_input: keep x itself for the weight gradient and quantize it there; else its operand
            is made and kept at once. Megatron asks for it where something else keeps x anyway, or
            where it empties x after the forward pass and fills it again before the backward one.
        splits: tokens of each expert; None: one weight, all tokens.
        mode, sequence_parallel, group: of tensor parallelism, as of the module.
    """

    quantizers: Quantizers
    weights: Sequence[QuantizedWeight]
    casting: Casting
    observer: Observer | None
    gradients: bool
    save_input: bool
    splits: Sequence[int] | None = None
    mode: str | None = None
    sequence_parallel: bool = False
    group: comm.Group | None = None

    def gathers(self, mode: str) -> bool:
        """Whether the tokens of this rank are a part of those of the products."""
        return self.sequence_parallel and self.mode == mode

    def leading(self, shape: Sequence[int]) -> list[int]:
        """All dimensions but the last of the products' tokens, of a rank's input of a shape."""
        found = list(shape[:-1])
        if self.gathers("column"):
            found[0] *= comm.group_size(self.group)
        return found

    def shared(self, mode: str) -> Casting:
        """The casting of a tensor whose tokens are spread over the ranks in `mode`."""
        if not self.gathers(mode):
            return replace(self.casting, splits=self.splits)
        assert self.group is not None
        return replace(self.casting, reduce=partial(comm.maximum, group=self.group))


def rowwise(
    quantizer: Quantizer, x: Tensor, role: str, casting: Casting, observer: Observer | None
) -> Operand:
    """The operand with blocks along the columns."""
    made = quantizer.rowwise(x, casting)
    if observer is not None and made.values is not x:
        observer(role, x, _dequantized(made, casting.splits))
    return made


def columnwise(
    quantizer: Quantizer, x: Tensor, role: str, casting: Casting, observer: Observer | None
) -> Operand:
    """The operand with blocks along the rows."""
    source = quantizer.columnwise_input(x)
    made = quantizer.columnwise(source, casting)
    if observer is not None and made.values is not source:
        observer(f"{role}_columnwise", source, _dequantized(made, casting.splits))
    return made


def quantize_weights(
    quantizer: Quantizer,
    weights: Sequence[Tensor],
    both: bool,
    casting: Casting,
    observer: Observer | None,
) -> list[QuantizedWeight]:
    """Quantize weights of one shape, for the data gradient too if `both`.

    They are stacked and cast together: a cast of a single expert's weight is too small to be
    worth its calls. The observer sees the stack.
    """
    rows = [len(w) for w in weights]
    if len(weights) == 1:
        stacked = weights[0].detach().contiguous()
    else:
        stacked = torch.cat([w.detach() for w in weights])
        casting = replace(casting, splits=rows)
    first = rowwise(quantizer, stacked, "weight", casting, observer)
    firsts = _split(first, rows)
    seconds: Sequence[Operand | None] = [None] * len(weights)
    if both and quantizer.square:
        seconds = firsts
    elif both:
        seconds = _split(columnwise(quantizer, stacked, "weight", casting, observer), rows)
    return [
        QuantizedWeight(a, b, identity(w)) for a, b, w in zip(firsts, seconds, weights, strict=True)
    ]


def _split(operand: Operand, rows: Sequence[int]) -> list[Operand]:
    """An operand of stacked tensors -> one a tensor."""
    values = operand.values.split(list(rows))
    return [replace(_segment(operand, i), values=part) for i, part in enumerate(values)]


def identity(weight: Tensor) -> tuple[Any, ...]:
    """Changes when the weight's storage does, or its values in a way that autograd sees."""
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape


def _dequantized(operand: Operand, splits: Sequence[int] | None) -> Tensor:
    if operand.amax is None or splits is None:
        return operand.dequantize()
    counts = torch.tensor(splits, device=operand.amax.device)
    factor = (operand.amax / operand.unit).repeat_interleave(counts)
    return operand.values.float() * factor[:, None]


def _gathered(operand: Operand, plan: Plan, mode: str) -> Operand:
    if not plan.gathers(mode):
        return operand
    return replace(operand, values=comm.gather_sequence(operand.values, plan.group))


def _rows(
    left: Operand, rights: Sequence[Operand], splits: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    """Products of runs of rows of `left`, each with its own right factor, below each other."""
    if splits is None:
        return product(left.values, rights[0].values, scales(left, rights[0]), dtype)
    columns = rights[0].values.shape[1]
    out = torch.empty(len(left.values), columns, dtype=dtype, device=left.values.device)
    start = 0
    for i, (count, right) in enumerate(zip(splits, rights, strict=True)):
        if count:
            rows = slice(start, start + count)
            alpha = scales(_segment(left, i), right)
            product(left.values[rows], right.values, alpha, dtype, out[rows])
        start += count
    return out


def _transposed(operand: Operand) -> Operand:
    return replace(operand, values=operand.values.t())


def _segment(operand: Operand, i: int) -> Operand:
    return operand if operand.amax is None else replace(operand, amax=operand.amax[i : i + 1])


def _weight_gradients(
    grad: Operand, x: Operand, splits: Sequence[int] | None, dtype: torch.dtype
) -> list[Tensor]:
    """g^T x of each expert; zeros for one without tokens."""
    if splits is None:
        return [product(grad.values.t(), x.values, scales(grad, x), dtype)]
    shape = len(splits), grad.values.shape[1], x.values.shape[1]
    stacked = x.values.new_zeros(shape, dtype=dtype)
    start = 0
    for i, count in enumerate(splits):
        if count:
            rows = slice(start, start + count)
            alpha = scales(_segment(grad, i), _segment(x, i))
            product(grad.values[rows].t(), x.values[rows], alpha, dtype, stacked[i])
        start += count
    return list(stacked.unbind(0))


def _saved_input(ctx: Any, plan: Plan) -> Operand:
    if not plan.save_input:
        values, amax = ctx.saved_tensors
        return Operand(values, amax, ctx.unit)
    (x,) = ctx.saved_tensors
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    casting = plan.shared("column")
    return columnwise(plan.quantizers.input, tokens, "input", casting, plan.observer)


class QuantizedProducts(torch.autograd.Function):
    """y_to = x_ti w^T with quantized operands; the leading dimensions of x are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *weights: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        quantizer, casting = plan.quantizers.input, plan.shared("column")
        left = rowwise(quantizer, tokens, "input", casting, plan.observer)
        left = _gathered(left, plan, "column")
        rights = [_transposed(w.rowwise) for w in plan.weights]
        y = _rows(left, rights, plan.splits, x.dtype)
        y = y.view(*plan.leading(x.shape), y.shape[-1])
        if plan.mode == "row" and plan.group is not None:
            reduce = comm.reduce_scatter_sequence if plan.sequence_parallel else comm.all_reduce
            y = reduce(y, plan.group)
        ctx.plan, ctx.dtype, ctx.x_shape = plan, x.dtype, x.shape
        if plan.gradients and any(ctx.needs_input_grad[2:]):
            if plan.save_input:
                ctx.save_for_backward(x)
            else:
                kept = columnwise(quantizer, tokens, "input", casting, plan.observer)
                ctx.save_for_backward(kept.values, kept.amax)
                ctx.unit = kept.unit
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        plan = ctx.plan
        gradient = grad.reshape(-1, grad.shape[-1]).contiguous()
        quantizer, casting = plan.quantizers.grad_output, plan.shared("row")
        dx: Tensor | None = None
        dw: Sequence[Tensor | None] = [None] * len(plan.weights)
        if ctx.needs_input_grad[0]:
            left = rowwise(quantizer, gradient, "grad_output", casting, plan.observer)
            left = _gathered(left, plan, "row")
            rights = [w.columnwise for w in plan.weights]
            dx = _rows(left, rights, plan.splits, ctx.dtype)
            dx = dx.view(*plan.leading(ctx.x_shape), dx.shape[-1])
            if plan.mode == "column" and plan.group is not None:
                scatter = plan.sequence_parallel
                reduce = comm.reduce_scatter_sequence if scatter else comm.all_reduce
                dx = reduce(dx, plan.group)
        if any(ctx.needs_input_grad[2:]):
            left = columnwise(quantizer, gradient, "grad_output", casting, plan.observer)
            right = _saved_input(ctx, plan)
            left, right = _gathered(left, plan, "row"), _gathered(right, plan, "column")
            dw = _weight_gradients(left, right, plan.splits, ctx.dtype)
        return dx, None, *dw
