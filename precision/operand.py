"""Quantised factors of a matrix product, and the product.

A block-scaled element times its block's stored scale is exact in BF16: E2M1 times E4M3 has at most
six significant bits, E4M3 times a power of two four. A product of such values in BF16 with FP32
accumulation is therefore the product that the hardware for the format computes, up to the order
of its sums. What is left of NVFP4's scaling, one FP32 number a tensor, multiplies the FP32 sums
before they are rounded to the output's dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_TAME = (2.0**-64, 2.0**64)
"""Range of |alpha| within which a BF16 kernel may scale its sums. Outside, it may overflow when it
scales its inputs instead, or flush a subnormal result."""


@dataclass(frozen=True)
class Operand:
    """A matrix, or matrices stacked along the rows, ready for a product.

    Attributes:
        values: [rows, columns], elements times stored block scales: BF16, or FP32 where BF16
            cannot hold them.
        amax: FP32 [segments]: largest magnitude of each tensor that was quantised; None: the
            format has no scale of the whole tensor.
        unit: the dequantised matrix is values * amax / unit.
    """

    values: Tensor
    amax: Tensor | None = None
    unit: float = 1.0

    def dequantize(self) -> Tensor:
        """FP32 values of an operand of one segment."""
        values = self.values.float()
        return values if self.amax is None else values * (self.amax / self.unit)


def scales(left: Operand, right: Operand) -> Tensor | None:
    """FP32 [segments]: what the sums of the products of two operands are multiplied by, computed
    as NVIDIA's reference does; None: nothing. One segment broadcasts against many."""
    given = [o.amax for o in (left, right) if o.amax is not None]
    if not given:
        return None
    alpha = given[0] if len(given) == 1 else given[0] * given[1]
    return alpha / (left.unit * right.unit)


def product(
    left: Tensor,
    right: Tensor,
    alpha: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """alpha * (left @ right), accumulated and scaled in FP32, rounded once to `dtype`.

    Args:
        left, right: [m, k] and [k, n], values of operands (either may be a transposed view).
        alpha: one of `scales`.
        out: [m, n] of `dtype`, written instead of a new tensor.
    """
    factor = 1.0 if alpha is None else float(alpha)
    tame = _TAME[0] <= abs(factor) <= _TAME[1]
    if tame and left.dtype == right.dtype == dtype == torch.bfloat16:
        ignored = left.new_zeros(1)
        if out is not None:
            return torch.addmm(ignored, left, right, beta=0, alpha=factor, out=out)
        return torch.addmm(ignored, left, right, beta=0, alpha=factor)
    result = torch.mm(left.float(), right.float())
    if alpha is not None:
        result *= alpha
    return result.to(dtype) if out is None else out.copy_(result)
