"""Blocks of a matrix that share a scale, and what is done to them at the speed of memory.

A matrix [rows, columns] is viewed so that each block is a group of axes (`Layout.view`), without
a copy and without a transpose whichever way the blocks lie; a reduction or a product with one
number a block is then a plain reduction or a broadcast.

Element-wise work on a CPU costs what its memory traffic costs, so it runs over spans that stay in
the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .formats import E2M1, ElementFormat, round_, stochastic_noise

SPAN_ELEMENTS = 1 << 18
"""Elements of a temporary on a CPU: a megabyte in FP32, shared by the threads."""


@dataclass(frozen=True)
class Layout:
    """Blocks of `height` x `width` elements; each is 1 or the block size."""

    height: int
    width: int

    def view(self, x: Tensor) -> Tensor:
        """[rows, columns] -> [rows / height, height, columns / width, width]; axes of length 1
        stand for a dimension that blocks do not span, so that long axes stay whole."""
        rows, columns = x.shape
        if self.width == 1:
            return x.view(rows // self.height, self.height, 1, columns)
        return x.view(rows // self.height, self.height, columns // self.width, self.width)

    @property
    def block_axes(self) -> tuple[int, ...]:
        """Axes of the view that one block spans."""
        return tuple(axis for axis, size in ((1, self.height), (3, self.width)) if size > 1)

    def compact(self, per_block: Tensor) -> Tensor:
        """One number a block, as `amax` gives it -> [rows / height, columns / width]."""
        return per_block.flatten(1)

    def check(self, x: Tensor, name: str) -> None:
        """Check that x is a matrix of whole blocks, both ways: the library wants that of either
        layout, because it may make both copies.

        Raises:
            ValueError: it is not.
            TypeError: its dtype is not FP32, BF16 or FP16.
        """
        block = max(self.height, self.width)
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} quantises FP32, BF16 or FP16, not {x.dtype}")
        if x.dim() != 2 or x.shape[0] % block or x.shape[1] % block:
            raise ValueError(
                f"{name} cannot quantise a matrix of {list(x.shape)}: both dimensions (leading "
                f"ones flattened) must be multiples of {block}"
            )


def amax(x: Tensor, layout: Layout) -> Tensor:
    """Largest magnitude of each block as FP32, shaped like the view with blocks of size 1.

    Magnitudes compare as integers: the bits of a float without the sign are in its order, NaN
    above infinity, so that a NaN is the maximum of its block.
    """
    wide = x.dtype == torch.float32
    integer, mask = (torch.int32, 0x7FFFFFFF) if wide else (torch.int16, 0x7FFF)
    bits = layout.view(x.view(integer))
    out = torch.empty(
        [1 if i in layout.block_axes else n for i, n in enumerate(bits.shape)],
        dtype=integer,
        device=x.device,
    )
    for part in spans(bits):
        # The reduction over neighbours comes last, when it has least to do.
        largest = bits[part] & mask
        for axis in layout.block_axes:
            largest = largest.amax(axis, keepdim=True)
        out[part] = largest
    return out.view(x.dtype).float()


def spans(view: Tensor) -> list[slice]:
    """Slices of the first axis that cover it; on a GPU one."""
    length = view.shape[0]
    row = max(1, view[:1].numel())
    step = max(1, SPAN_ELEMENTS // row) if view.is_cpu else max(1, length)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def scaled(
    x: Tensor,
    layout: Layout,
    form: ElementFormat,
    multiplier: Tensor,
    stored: Tensor | None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """round(clamp(x * multiplier)) * stored, [rows, columns] of `dtype`.

    Args:
        multiplier: FP32, one a block, shaped as by `amax`: what brings x into the range of
            `form`.
        stored: what each rounded element is multiplied by; None: nothing, and zeros get the
            sign of what was rounded (but -0 becomes +0 in E2M1, as in NVIDIA's reference).
        generator: round stochastically with its draws; None: to nearest even.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    source, target = layout.view(x), layout.view(out)
    parts = spans(source)
    longest = source[parts[0]].numel() if parts else 0
    buffers = torch.empty(2 + (generator is not None), longest, device=x.device)
    for part in parts:
        shape = source[part].shape
        y, scratch, *noise = buffers[:, : shape.numel()].unflatten(1, shape)
        y.copy_(source[part])
        y.mul_(multiplier[part]).clamp_(-form.largest, form.largest)
        sign = y if stored is not None else y + (0.0 if form is E2M1 else -0.0)
        if generator is not None:
            noise[0].copy_(stochastic_noise(shape.numel(), generator).view(shape))
        round_(y, form, scratch, *noise)
        if stored is not None:
            y.mul_(stored[part])
        else:
            y.copysign_(sign)
        target[part] = y
    return out


def rounded(x: Tensor, layout: Layout, form: ElementFormat, smallest: Tensor) -> Tensor:
    """x rounded, to nearest even, to values of `form` times a power of two a block: what `scaled`
    gives for powers of two in fewer passes. BF16 [rows, columns].

    Args:
        x: at most the largest value of `form` times its block's power, but for what rounds to it.
        smallest: FP32, one a block, shaped as by `amax`: the smallest normal number of `form`
            times the power.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    source, target = layout.view(x), layout.view(out)
    parts = spans(source)
    longest = source[parts[0]].numel() if parts else 0
    buffers = torch.empty(2, longest, device=x.device)
    for part in parts:
        shape = source[part].shape
        y, scratch = buffers[:, : shape.numel()].unflatten(1, shape)
        y.copy_(source[part])
        round_(y, form, scratch, smallest=smallest[part])
        target[part] = y
    return out


def per_row(values: Tensor, splits: Sequence[int] | None, layout: Layout) -> Tensor:
    """One number a segment of rows -> one a row of blocks, to broadcast against `amax`.

    Args:
        values: [segments].
        splits: rows of each segment; None: one segment.
    """
    if splits is None:
        return values
    counts = torch.tensor([n // layout.height for n in splits], device=values.device)
    return values.repeat_interleave(counts).view(-1, 1, 1, 1)


def segment_amax(
    blocks: Tensor,
    splits: Sequence[int] | None,
    layout: Layout,
    reduce: Callable[[Tensor], Any] | None,
) -> Tensor:
    """Largest block maximum of each segment of rows, [segments]; 0 of an empty one.

    Args:
        reduce: applied in place to the result, for instance a maximum over ranks.
    """
    counts = [blocks.shape[0]] if splits is None else [n // layout.height for n in splits]
    parts = blocks.split(counts)
    found = [p.amax() if p.numel() else blocks.new_zeros(()) for p in parts]
    result = torch.stack(found)
    if reduce is not None:
        reduce(result)
    return result


def check_splits(splits: Sequence[int] | None, block: int, name: str) -> None:
    """Check that no block would belong to two of the stacked tensors.

    Raises:
        ValueError: a number of rows is no multiple of the block.
    """
    for i, rows in enumerate(splits or ()):
        if rows % block:
            raise ValueError(
                f"{name} cannot quantise the {rows} tokens of expert {i}: {rows} % {block} = "
                f"{rows % block}; pad them (moe_router_padding_for_quantization)"
            )
