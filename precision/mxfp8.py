"""MXFP8: E4M3 (or, for gradients, E5M2) elements, a power of two for each block of 32.

With b = max|x| of a block, in FP32 (Transformer Engine's `float_to_e8m0`, "RCEIL" elsewhere):

    2^e = the smallest power of two that is at least b * (1/448)     (1/57344 for E5M2)
    q   = E4M3(clamp(x * 2^-e, -448, 448))
    x   ~ q * 2^e

Blocks are 1x32 along the columns, 32x1 along the rows, or 32x32 (weights, if asked for).

Non-finite input: an infinity makes its block's scale 2^127, whose largest product with an element
is infinite, so that it stays infinite and its neighbours vanish; a NaN makes its block NaN.
(Transformer Engine's kernel keeps a NaN to its element, but every product that meets the one
meets the other.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import blocks
from .blocks import Layout
from .formats import E4M3, ElementFormat, decode, decode_e8m0, encode, encode_e8m0
from .operand import Operand

BLOCK = 32
ROWWISE = Layout(1, BLOCK)
COLUMNWISE = Layout(BLOCK, 1)
SQUARE = Layout(BLOCK, BLOCK)

_BF16_EXPONENTS = (17, 239)
"""Biased exponents between which every element (2^-16 to 57344 in magnitude) times its scale is a
normal, finite BF16 number. Kernels flush subnormals."""


def quantize(
    x: Tensor, layout: Layout, form: ElementFormat = E4M3, splits: Sequence[int] | None = None
) -> Operand:
    """Quantise a contiguous matrix for a product.

    Args:
        x: [rows, columns], FP32, BF16 or FP16.
        layout: ROWWISE, COLUMNWISE or SQUARE.
        form: E4M3 or E5M2.
        splits: rows of each of several tensors stacked in x; only checked, for every scale is of
            one block.

    Raises:
        ValueError: x, or a part of it, is not made of whole blocks.
        TypeError: its dtype.
    """
    blocks.check_splits(splits, BLOCK, "MXFP8")
    biased, zero = _exponents(x, layout, form)
    low, high = _BF16_EXPONENTS
    held = ((biased >= low) & (biased <= high)) | zero
    dtype = torch.bfloat16 if bool(held.all()) else torch.float32
    stored = decode_e8m0(biased)
    return Operand(blocks.scaled(x, layout, form, _reciprocal(biased), stored, dtype=dtype))


@dataclass(frozen=True)
class Packed:
    """A matrix as it is stored: a byte an element, and a byte a block.

    Attributes:
        data: uint8 codes [rows, columns].
        scale: uint8 biased exponents of the blocks, [rows, columns / 32], [rows / 32, columns],
            or [rows / 32, columns / 32].
        layout: of the blocks.
        form: of the elements.
    """

    data: Tensor
    scale: Tensor
    layout: Layout
    form: ElementFormat


def pack(x: Tensor, layout: Layout, form: ElementFormat = E4M3) -> Packed:
    """Quantise a contiguous matrix for storage; arguments and errors as of `quantize`."""
    biased, _ = _exponents(x, layout, form)
    q = blocks.scaled(x, layout, form, _reciprocal(biased), None)
    return Packed(encode(q, form), layout.compact(biased), layout, form)


def dequantize(packed: Packed) -> Tensor:
    """FP32 [rows, columns]."""
    scale = decode_e8m0(packed.scale)
    for axis, size in enumerate((packed.layout.height, packed.layout.width)):
        scale = scale.repeat_interleave(size, axis)
    return decode(packed.data, packed.form) * scale


def _exponents(x: Tensor, layout: Layout, form: ElementFormat) -> tuple[Tensor, Tensor]:
    """Biased exponents, uint8, and where the block is zero; shaped as by `blocks.amax`."""
    layout.check(x, "MXFP8")
    reciprocal = torch.tensor(1.0 / form.largest, dtype=torch.float32, device=x.device)
    largest = blocks.amax(x, layout)
    return encode_e8m0(largest * reciprocal, "up"), largest == 0


def _reciprocal(biased: Tensor) -> Tensor:
    """2^-e of biased exponents; of 255, NaN."""
    return decode_e8m0(torch.where(biased == 255, 255, 254 - biased.int()))
