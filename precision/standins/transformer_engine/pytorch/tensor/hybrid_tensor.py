"""One quantizer for each direction."""

from torch import Tensor

from precision.operand import Operand

from ..quantized_tensor import Casting, Quantizer


class HybridQuantizer(Quantizer):
    """The row-wise operands of one quantizer and the column-wise ones of another."""

    def __init__(self, *, rowwise_quantizer: Quantizer, columnwise_quantizer: Quantizer) -> None:
        self.rowwise_quantizer = rowwise_quantizer
        self.columnwise_quantizer = columnwise_quantizer

    def rowwise(self, x: Tensor, casting: Casting) -> Operand:
        """Of the first."""
        return self.rowwise_quantizer.rowwise(x, casting)

    def columnwise_input(self, x: Tensor) -> Tensor:
        """Of the second."""
        return self.columnwise_quantizer.columnwise_input(x)

    def columnwise(self, x: Tensor, casting: Casting) -> Operand:
        """Of the second."""
        return self.columnwise_quantizer.columnwise(x, casting)
