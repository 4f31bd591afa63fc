"""What quantisation does to a tensor: values flushed to zero, cut off at the top, and the error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from precision import blocks, mxfp8, nvfp4
from precision.blocks import Layout


@dataclass
class Tally:
    """Sums over the elements of one tensor, or of many: tallies of micro batches and ranks add
    up before shares are taken."""

    elements: int = 0
    nonzero: int = 0
    """Elements that are not zero before quantisation."""
    flushed: int = 0
    """Those of them that are zero afterwards."""
    saturated: int = 0
    """Elements larger than every magnitude left in their block: cut off at its largest value, or,
    where rounding is stochastic, rounded down from it."""
    squares: float = 0.0
    """Sum of squares before."""
    errors: float = 0.0
    """Sum of squares of what quantisation changed."""

    def __iadd__(self, other: "Tally") -> "Tally":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def shares(self) -> dict[str, float]:
        """flushed: of the non-zero elements (the `underflows%` of Transformer Engine's
        LogNvfp4TensorStats, as a share); saturated: of all; error: relative, in the 2-norm."""
        return {
            "flushed": self.flushed / max(1, self.nonzero),
            "saturated": self.saturated / max(1, self.elements),
            "error": (self.errors / self.squares) ** 0.5 if self.squares else 0.0,
        }


def layout_of(form: str, role: str, square_weights: bool) -> Layout:
    """Blocks of a quantised operand.

    Args:
        form: nvfp4 or mxfp8.
        role: the operand, as the stand-in's observer names it: input, weight or grad_output, with
            `_columnwise` appended where blocks lie along the rows.
        square_weights: weights have square blocks.
    """
    module = nvfp4 if form == "nvfp4" else mxfp8
    if role.startswith("weight") and square_weights:
        return module.SQUARE
    return module.COLUMNWISE if role.endswith("_columnwise") else module.ROWWISE


def tally(source: Tensor, quantized: Tensor, layout: Layout) -> Tally:
    """Compare a matrix with what quantisation made of it.

    Args:
        source: [rows, columns] before.
        quantized: FP32 [rows, columns], dequantised.
        layout: its blocks.
    """
    before, after = source.float(), quantized.float()
    nonzero = before != 0
    held = blocks.amax(after.contiguous(), layout)
    above = layout.view(before.abs().contiguous()) > held
    return Tally(
        elements=before.numel(),
        nonzero=int(nonzero.sum()),
        flushed=int((nonzero & (after == 0)).sum()),
        saturated=int((above & (held > 0)).sum()),
        squares=float(torch.linalg.vector_norm(before, dtype=torch.float64) ** 2),
        errors=float(torch.linalg.vector_norm(after - before, dtype=torch.float64) ** 2),
    )
