"""Padding of each expert's tokens to what quantized grouped products need."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantization import FP8GlobalStateManager, get_align_size_for_quantization


class _Aligned(nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.align_size = align_size

    def padded(self, m_splits: Sequence[int]) -> list[int]:
        """Row counts rounded up; the alignment is that of the first recipe met."""
        if len(m_splits) != self.num_gemms:
            raise ValueError(f"m_splits has {len(m_splits)} counts, not {self.num_gemms}")
        if self.align_size is None:
            recipe = FP8GlobalStateManager.get_fp8_recipe()
            self.align_size = get_align_size_for_quantization(recipe)
        return [-(-rows // self.align_size) * self.align_size for rows in m_splits]


class Fp8Padding(_Aligned):
    """Appends rows of zeros to each expert's."""

    def forward(self, inp: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, list[int]]:
        """[tokens, d] -> [padded tokens, d], and the padded row counts."""
        padded = self.padded(m_splits)
        if padded == list(m_splits):
            return inp, padded
        parts = inp.split(list(m_splits))
        missing = [p - m for p, m in zip(padded, m_splits, strict=True)]
        grown = [F.pad(part, (0, 0, 0, n)) for part, n in zip(parts, missing, strict=True)]
        return torch.cat(grown), padded


class Fp8Unpadding(_Aligned):
    """Removes what Fp8Padding appended."""

    def forward(self, inp: Tensor, m_splits: Sequence[int]) -> Tensor:
        """[padded tokens, d] -> [tokens, d]; m_splits are the row counts without padding."""
        padded = self.padded(m_splits)
        if padded == list(m_splits):
            return inp
        parts = inp.split(padded)
        return torch.cat([part[:rows] for part, rows in zip(parts, m_splits, strict=True)])
