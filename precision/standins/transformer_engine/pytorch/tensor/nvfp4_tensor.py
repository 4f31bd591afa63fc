"""The NVFP4 quantizer."""

from typing import Any

from torch import Tensor

from precision import hadamard, nvfp4
from precision.operand import Operand

from ..constants import DType
from ..module import refuse
from ..quantized_tensor import Casting, Quantizer


class NVFP4Quantizer(Quantizer):
    """Blocks of 16 (16x16 with_2d_quantization); with_rht, column-wise operands are transformed
    along the rows first. `precision.nvfp4` has the arithmetic."""

    def __init__(
        self,
        fp4_dtype: DType = DType.kFloat4E2M1,
        with_rht: bool = False,
        with_post_rht_amax: bool = False,
        with_2d_quantization: bool = False,
        stochastic_rounding: bool = False,
        with_random_sign_mask: bool = True,
        rowwise: bool = True,
        columnwise: bool = True,
        **unsupported: Any,
    ) -> None:
        refuse(
            "NVFP4Quantizer",
            fp4_dtype=None if fp4_dtype == DType.kFloat4E2M1 else fp4_dtype,
            with_post_rht_amax_unlike_with_rht=with_post_rht_amax != with_rht,
            with_rht_and_2d_quantization=with_rht and with_2d_quantization,
            without_random_sign_mask=with_rht and not with_random_sign_mask,
            **unsupported,
        )
        self.with_rht = with_rht
        self.stochastic_rounding = stochastic_rounding
        self.square = with_2d_quantization

    def rowwise(self, x: Tensor, casting: Casting) -> Operand:
        """Blocks along the columns, or square."""
        return self._quantize(x, nvfp4.SQUARE if self.square else nvfp4.ROWWISE, casting)

    def columnwise_input(self, x: Tensor) -> Tensor:
        """The random Hadamard transform of x, if it is on."""
        return hadamard.transform(x) if self.with_rht else x

    def columnwise(self, x: Tensor, casting: Casting) -> Operand:
        """Blocks along the rows, or square."""
        return self._quantize(x, nvfp4.SQUARE if self.square else nvfp4.COLUMNWISE, casting)

    def _quantize(self, x: Tensor, layout: nvfp4.Layout, casting: Casting) -> Operand:
        generator = casting.generator if self.stochastic_rounding else None
        return nvfp4.quantize(x, layout, generator, casting.splits, casting.reduce)
