"""The MXFP8 quantizer."""

from torch import Tensor

from precision import mxfp8
from precision.formats import E4M3, E5M2
from precision.operand import Operand

from ..constants import DType
from ..quantized_tensor import Casting, Quantizer


class MXFP8Quantizer(Quantizer):
    """Blocks of 32 (32x32 with_2d_quantization). `precision.mxfp8` has the arithmetic."""

    def __init__(
        self,
        fp8_dtype: DType,
        *,
        rowwise: bool = True,
        columnwise: bool = True,
        with_2d_quantization: bool = False,
    ) -> None:
        self.form = {DType.kFloat8E4M3: E4M3, DType.kFloat8E5M2: E5M2}[fp8_dtype]
        self.square = with_2d_quantization

    def rowwise(self, x: Tensor, casting: Casting) -> Operand:
        """Blocks along the columns, or square."""
        layout = mxfp8.SQUARE if self.square else mxfp8.ROWWISE
        return mxfp8.quantize(x, layout, self.form, casting.splits, casting.reduce)

    def columnwise(self, x: Tensor, casting: Casting) -> Operand:
        """Blocks along the rows, or square."""
        layout = mxfp8.SQUARE if self.square else mxfp8.COLUMNWISE
        return mxfp8.quantize(x, layout, self.form, casting.splits, casting.reduce)
