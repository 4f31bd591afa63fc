"""NVFP4: E2M1 elements, an E4M3 scale for each block of 16, an FP32 scale for the tensor.

With a = max|x| of the tensor and b of a block, all in FP32 (arXiv 2509.25149, appendix B; in the
order of operations of Transformer Engine, which folds the 1/6 into the tensor's scale):

    encode     = min(6 * 448 / a, largest FP32); 1 if a is infinite
    stored     = E4M3(min(b * (encode * (1/6)), 448))
    multiplier = min(1 / (stored * (1/encode)), largest FP32)
    q          = E2M1(clamp(x * multiplier, -6, 6))
    x          ~ q * stored * a / (6 * 448)

Blocks are 1x16 along the columns (a product over features), 16x1 along the rows (a product over
tokens), or 16x16 (weights, so that W and its transpose see the same values).

Non-finite input, as in NVIDIA's reference: a NaN makes the tensor's scale NaN and so every sum of
the product; an infinity makes it infinite. (Transformer Engine's kernel drops NaN from maxima and
casts it to 6, which would hide a failure.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import blocks
from .blocks import Layout
from .formats import E2M1, E4M3, decode, encode, pack_nibbles, unpack_nibbles
from .operand import Operand

BLOCK = 16
UNIT = E2M1.largest * E4M3.largest
ROWWISE = Layout(1, BLOCK)
COLUMNWISE = Layout(BLOCK, 1)
SQUARE = Layout(BLOCK, BLOCK)


@dataclass(frozen=True)
class Scales:
    """Block and tensor scales; those of blocks are shaped as by `blocks.amax`.

    Attributes:
        stored: E4M3 scales, as FP32.
        multiplier: FP32, what elements are multiplied by before they are rounded.
        amax: FP32 [segments], the largest magnitudes the tensor's scale comes from.
    """

    stored: Tensor
    multiplier: Tensor
    amax: Tensor


def block_scales(
    x: Tensor,
    layout: Layout,
    splits: Sequence[int] | None = None,
    reduce: Callable[[Tensor], Any] | None = None,
) -> Scales:
    """Scales of a matrix; arguments as of `quantize`."""
    layout.check(x, "NVFP4")
    block_amax = blocks.amax(x, layout)
    amax = blocks.segment_amax(block_amax, splits, layout, reduce)
    largest = torch.finfo(torch.float32).max
    # A true division: `UNIT / amax` of a Python number would multiply by a reciprocal.
    global_encode = (torch.full_like(amax, UNIT) / amax).clamp(max=largest)
    global_encode = torch.where(global_encode == 0, 1.0, global_encode)
    sixth = torch.tensor(1.0, device=x.device) / E2M1.largest
    to_stored = blocks.per_row(global_encode * sixth, splits, layout)
    decode_scale = blocks.per_row(1.0 / global_encode, splits, layout)
    stored = (block_amax * to_stored).clamp(max=E4M3.largest).to(torch.float8_e4m3fn).float()
    multiplier = (1.0 / (stored * decode_scale)).clamp(max=largest)
    return Scales(stored, multiplier, amax)


def quantize(
    x: Tensor,
    layout: Layout,
    generator: torch.Generator | None = None,
    splits: Sequence[int] | None = None,
    reduce: Callable[[Tensor], Any] | None = None,
) -> Operand:
    """Quantise a contiguous matrix for a product.

    Args:
        x: [rows, columns], FP32, BF16 or FP16.
        layout: ROWWISE, COLUMNWISE or SQUARE.
        generator: round stochastically with its draws; None: to nearest even.
        splits: rows of each of several tensors stacked in x, each with a scale of its own.
        reduce: applied in place to the tensor maxima, [segments], before they are used: ranks
            that hold parts of one tensor share a maximum.

    Raises:
        ValueError: x, or a part of it, is not made of whole blocks.
        TypeError: its dtype.
    """
    blocks.check_splits(splits, BLOCK, "NVFP4")
    found = block_scales(x, layout, splits, reduce)
    values = blocks.scaled(x, layout, E2M1, found.multiplier, found.stored, generator)
    return Operand(values, found.amax, UNIT)


@dataclass(frozen=True)
class Packed:
    """A matrix as it is stored: half a byte an element, and scales.

    Attributes:
        data: uint8, two codes a byte, the first in the low nibble. [rows, columns / 2], or
            transposed, [columns, rows / 2], if blocks lie along the rows.
        scale: E4M3 [rows of data, elements of a row / 16]; the rows of a 16x16 block repeat it.
        amax: FP32 [1].
        layout: of the blocks.
    """

    data: Tensor
    scale: Tensor
    amax: Tensor
    layout: Layout


def pack(x: Tensor, layout: Layout, generator: torch.Generator | None = None) -> Packed:
    """Quantise a contiguous matrix for storage; arguments and errors as of `quantize`."""
    found = block_scales(x, layout)
    q = blocks.scaled(x, layout, E2M1, found.multiplier, None, generator)
    # The scale of a block with a NaN is NaN, whatever its codes; they are 0 as in the reference.
    codes = encode(q.nan_to_num_(0.0), E2M1)
    scale = layout.compact(found.stored)
    if layout.width == 1:
        codes, scale = codes.t().contiguous(), scale.t().contiguous()
    elif layout.height > 1:
        scale = scale.repeat_interleave(BLOCK, 0)
    return Packed(pack_nibbles(codes), scale.to(torch.float8_e4m3fn), found.amax, layout)


def unpack(packed: Packed) -> Operand:
    """The operand that `quantize` makes of the same matrix (up to the signs of zeros)."""
    values = decode(unpack_nibbles(packed.data), E2M1)
    values *= packed.scale.float().repeat_interleave(BLOCK, 1)
    if packed.layout.width == 1:
        values = values.t().contiguous()
    return Operand(values.bfloat16(), packed.amax, UNIT)


def dequantize(packed: Packed) -> Tensor:
    """FP32 [rows, columns]."""
    return unpack(packed).dequantize()
