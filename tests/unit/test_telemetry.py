"""Telemetry counts, on blocks worked out by hand."""

import pytest
import torch

from precision.nvfp4 import COLUMNWISE, ROWWISE, SQUARE, quantize
from precision.telemetry import Tally, layout_of, tally


def test_counts_by_hand() -> None:
    # Two blocks of 16: one loses its small values, the other's largest is cut from 7 to 6.
    before, after = torch.zeros(16, 32), torch.zeros(16, 32)
    before[0, :4] = torch.tensor([6.0, 0.1, -0.1, 2.0])
    after[0, :4] = torch.tensor([6.0, 0.0, 0.0, 2.0])
    before[0, 16:18] = torch.tensor([-7.0, 3.0])
    after[0, 16:18] = torch.tensor([-6.0, 3.0])
    found = tally(before, after, ROWWISE)
    assert (found.elements, found.nonzero, found.flushed, found.saturated) == (512, 6, 2, 1)
    assert found.squares == pytest.approx(36 + 0.02 + 4 + 49 + 9)
    assert found.errors == pytest.approx(0.02 + 1)
    shares = found.shares()
    assert shares["flushed"] == pytest.approx(2 / 6)
    assert shares["saturated"] == pytest.approx(1 / 512)
    assert shares["error"] == pytest.approx((1.02 / 98.02) ** 0.5)


def test_tallies_add_up_and_nothing_is_nothing() -> None:
    total = Tally()
    assert total.shares() == {"flushed": 0, "saturated": 0, "error": 0}
    for part in (Tally(4, 3, 1, 1, 2.0, 1.0), Tally(4, 3, 2, 0, 6.0, 1.0)):
        total += part
    assert total == Tally(8, 6, 3, 1, 8.0, 2.0)


def test_blocks_of_a_role() -> None:
    assert layout_of("nvfp4", "input", True) == ROWWISE
    assert layout_of("nvfp4", "grad_output_columnwise", True) == COLUMNWISE
    assert layout_of("nvfp4", "weight", True) == SQUARE
    assert layout_of("nvfp4", "weight_columnwise", False) == COLUMNWISE
    assert layout_of("mxfp8", "weight", False).width == 32


def test_random_data_loses_what_is_expected() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256).bfloat16()
    shares = tally(x, quantize(x, ROWWISE).dequantize(), ROWWISE).shares()
    assert 0.08 < shares["error"] < 0.11  # 0.0955 for Gaussian data
    # |x| below half the smallest step, amax / 24 of a block of 16 Gaussian numbers.
    assert 0.04 < shares["flushed"] < 0.09
