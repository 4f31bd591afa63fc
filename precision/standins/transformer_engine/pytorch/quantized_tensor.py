"""What quantizers have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precision.operand import Operand


@dataclass(frozen=True)
class Casting:
    """What a cast depends on besides its tensor.

    Attributes:
        generator: of stochastic rounding, for quantizers that round so.
        splits: rows of each of several tensors stacked in one; None: it is one tensor.
        reduce: makes a tensor the largest of all ranks' in place, where they hold parts of one
            tensor, before a scale or a dtype is chosen by it; None: nothing.
    """

    generator: torch.Generator
    splits: Sequence[int] | None = None
    reduce: Callable[[Tensor], Any] | None = None


class Quantizer:
    """Makes operands of products from contiguous matrices.

    Like the real library it can make two of a matrix: row-wise, for products over its columns,
    and column-wise, for products over its rows. A factory of CustomRecipe may return a
    subclass of one's own; the library's reference quantizers, whose members are others, are none.

    Attributes:
        square: both are the same (blocks are square).
    """

    square = False

    def rowwise(self, x: Tensor, casting: Casting) -> Operand:
        """x [rows, columns] with blocks along the columns."""
        raise NotImplementedError

    def columnwise_input(self, x: Tensor) -> Tensor:
        """What `columnwise` is given: x, or its transform along the rows."""
        return x

    def columnwise(self, x: Tensor, casting: Casting) -> Operand:
        """x [rows, columns] with blocks along the rows."""
        raise NotImplementedError
