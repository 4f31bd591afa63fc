"""Cutting a long axis into spans that stay in a core's cache.

Element-wise work on a CPU costs what its memory traffic costs. Several operations in a row
over a span that fits the cache read the main memory once; over a whole sequence they read it
once each.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SPAN_ELEMENTS = 1 << 19
"""Elements of one temporary: two megabytes in float32, so that a few fit the last-level cache
and the cost of a call is small beside its work."""


def spans(length: int, row_elements: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges that cover `length` rows of `row_elements` elements, in order."""
    step = max(1, SPAN_ELEMENTS // max(1, row_elements))
    for start in range(0, length, step):
        yield start, min(start + step, length)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32: what sums and decays are kept in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
