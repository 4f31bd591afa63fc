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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

_PLAIN_EXPONENTS = (17, 218)
"""Biased exponents between which every element (2^-16 to 57344 in magnitude) times its scale is a
normal, finite BF16 number (kernels flush subnormals), and FP32 has room for how it is rounded."""


def quantize(
    x: Tensor,
    layout: Layout,
    form: ElementFormat = E4M3,
    splits: Sequence[int] | None = None,
    reduce: Callable[[Tensor], Any] | None = None,
) -> Operand:
    """Quantise a contiguous matrix for a product.

    Args:
        x: [rows, columns], FP32, BF16 or FP16.
        layout: ROWWISE, COLUMNWISE or SQUARE.
        form: E4M3 or E5M2.
        splits: rows of each of several tensors stacked in x; only checked, for every scale is of
            one block.
        reduce: makes a number the largest of all ranks' in place, where they gather the values:
            one that needs FP32 gives it to all, or they would gather different dtypes.

    Raises:
        ValueError: x, or a part of it, is not made of whole blocks.
        TypeError: its dtype.
    """
    blocks.check_splits(splits, BLOCK, "MXFP8")
    layout.check(x, "MXFP8")
    largest = blocks.amax(x, layout)
    ratio = largest * _reciprocal_of_largest(form, x.device)
    # The next power of two of a normal number: its exponent, one more if there is a mantissa.
    biased = (ratio.view(torch.int32) + 0x7FFFFF) >> 23
    low, high = _PLAIN_EXPONENTS
    plain = ((biased >= low) & (biased <= high)) | (largest == 0)
    needs_full = (~plain).any().float()
    if reduce is not None:
        reduce(needs_full)
    if not needs_full:
        smallest = (biased.clamp_(min=low) + form.min_exponent << 23).view(torch.float32)
        return Operand(blocks.rounded(x, layout, form, smallest))
    codes = encode_e8m0(ratio, "up")
    multiplier, stored = _reciprocal(codes), decode_e8m0(codes)
    return Operand(blocks.scaled(x, layout, form, multiplier, stored, dtype=torch.float32))


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
    layout.check(x, "MXFP8")
    ratio = blocks.amax(x, layout) * _reciprocal_of_largest(form, x.device)
    biased = encode_e8m0(ratio, "up")
    q = blocks.scaled(x, layout, form, _reciprocal(biased), None)
    return Packed(encode(q, form), layout.compact(biased), layout, form)


def dequantize(packed: Packed) -> Tensor:
    """FP32 [rows, columns]."""
    scale = decode_e8m0(packed.scale)
    for axis, size in enumerate((packed.layout.height, packed.layout.width)):
        scale = scale.repeat_interleave(size, axis)
    return decode(packed.data, packed.form) * scale


def _reciprocal_of_largest(form: ElementFormat, device: torch.device) -> Tensor:
    """Rounded to FP32 before it multiplies, as in Transformer Engine."""
    return torch.tensor(1.0 / form.largest, dtype=torch.float32, device=device)


def _reciprocal(biased: Tensor) -> Tensor:
    """2^-e of biased exponents; of 255, NaN."""
    return decode_e8m0(torch.where(biased == 255, 255, 254 - biased.int()))
