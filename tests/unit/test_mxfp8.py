"""MXFP8 against its definition written out with ml_dtypes, element by element."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from precision import mxfp8
from precision.blocks import Layout
from precision.formats import E4M3, E5M2, ElementFormat
from precision.operand import product, scales

LAYOUTS = [mxfp8.ROWWISE, mxfp8.COLUMNWISE, mxfp8.SQUARE]
NAMES = ["1x32", "32x1", "32x32"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def definition(x: Tensor, layout: Layout, form: ElementFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantised values, float64; biased exponents of the blocks; codes."""
    theirs = ml_dtypes.float8_e4m3fn if form is E4M3 else ml_dtypes.float8_e5m2
    rows, columns = x.shape[0] // layout.height, x.shape[1] // layout.width
    out = np.empty(tuple(x.shape))
    codes = np.empty(tuple(x.shape), np.uint8)
    exponents = torch.zeros(rows, columns, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            place = (
                slice(i * layout.height, (i + 1) * layout.height),
                slice(j * layout.width, (j + 1) * layout.width),
            )
            block = x[place].float().numpy()
            ratio = np.abs(block).max() * np.float32(1 / form.largest)
            e = -127 if ratio == 0 else max(-127, int(np.ceil(np.log2(np.float64(ratio)))))
            scaled = np.clip(block.astype(np.float64) * 2.0**-e, -form.largest, form.largest)
            elements = scaled.astype(np.float32).astype(theirs)
            codes[place] = elements.view(np.uint8)
            out[place] = elements.astype(np.float64) * 2.0**e
            exponents[i, j] = e + 127
    return torch.from_numpy(out), exponents, torch.from_numpy(codes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("form", [E4M3, E5M2], ids=["E4M3", "E5M2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_the_definition(layout: Layout, form: ElementFormat, dtype: torch.dtype) -> None:
    x = (torch.randn(64, 96) * torch.randn(64, 96).exp()).to(dtype)
    x[:32, :32] = 0
    x[33:37, 40] = 448.0  # a maximum that is exactly the largest element, and then twice it
    x[50, 80] = 896.0
    x[:2, :4], x[3, 80], x[4, 80] = -0.0, -0.0, -1e-7  # zeros keep their signs
    values, exponents, codes = definition(x, layout, form)
    found = mxfp8.quantize(x, layout, form)
    assert found.values.dtype == torch.bfloat16 and found.amax is None
    assert torch.equal(found.values.double(), values)
    packed = mxfp8.pack(x, layout, form)
    assert torch.equal(packed.scale, exponents)
    assert torch.equal(packed.data, codes)
    assert torch.equal(mxfp8.dequantize(packed).double(), values)


def test_a_block_by_hand() -> None:
    x = torch.zeros(32, 32)
    x[0, :4] = torch.tensor([448.0, 449.0 / 448, -0.0005, 17.0])
    x[1, 0] = 449.0
    packed = mxfp8.pack(x, mxfp8.ROWWISE)
    assert packed.scale[:3, 0].tolist() == [127, 128, 0]  # 2^0; just above 448: 2^1; zeros
    # Elements near 1 are 1/8 apart; the smallest are multiples of 2^-9, of which 0.0005 is a
    # quarter; those between 16 and 32 are 2 apart, so that 17 is a tie, and 16 is even.
    assert mxfp8.dequantize(packed)[0, :4].tolist() == [448, 1, 0, 16]
    assert mxfp8.dequantize(packed)[1, 0] == 448  # 224.5 rounds to 224


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
@pytest.mark.parametrize("form", [E4M3, E5M2], ids=["E4M3", "E5M2"])
@pytest.mark.parametrize("size", [1e-38, 1e-40, 3e-45, 1e-33, 2e32, 2e33, 1e36, 3e38])
def test_ends_of_the_range(layout: Layout, size: float, form: ElementFormat) -> None:
    """Where BF16 cannot hold a value, FP32 does, and products keep it."""
    x = torch.rand(32, 64) * size
    x[0, 0] = size
    values, exponents, _ = definition(x, layout, form)
    found = mxfp8.quantize(x, layout, form)
    assert torch.equal(found.values.double(), values.float().double())
    assert torch.equal(mxfp8.pack(x, layout, form).scale, exponents)
    eye = mxfp8.quantize(torch.eye(64), mxfp8.SQUARE)
    y = product(found.values, eye.values, scales(found, eye), torch.float32)
    assert torch.equal(y, found.values.float())


def test_non_finite_input() -> None:
    x = torch.ones(64, 64)
    x[0, 0], x[32, 32] = float("nan"), float("inf")
    packed = mxfp8.pack(x, mxfp8.ROWWISE)
    assert packed.scale[0, 0] == 255 and packed.scale[32, 1] == 254
    y = mxfp8.quantize(x, mxfp8.ROWWISE).values.float() @ torch.ones(64, 1)
    assert y[0].isnan() and y[32].isinf() and (y[[1, 31, 33]] == 64).all()


def test_refused() -> None:
    for shape in ((32, 48), (48, 32), (32,), (1, 32, 32)):
        with pytest.raises(ValueError, match="multiples of 32"):
            mxfp8.quantize(torch.ones(shape), mxfp8.ROWWISE)
    with pytest.raises(ValueError, match="expert 0: 16 % 32 = 16"):
        mxfp8.quantize(torch.ones(32, 32), mxfp8.ROWWISE, splits=[16, 16])
    with pytest.raises(TypeError, match="float64"):
        mxfp8.quantize(torch.ones(32, 32, dtype=torch.float64), mxfp8.ROWWISE)
