"""NVFP4 against blocks worked by hand, its definition in float64, and NVIDIA's own reference."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from precision import hadamard, mxfp8, nvfp4
from precision.blocks import Layout
from precision.formats import E2M1, decode, unpack_nibbles
from precision.operand import product, scales
from tests.unit.oracles import run, unpacked

LAYOUTS = [nvfp4.ROWWISE, nvfp4.COLUMNWISE, nvfp4.SQUARE]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_nvidias_reference_agrees_bit_for_bit() -> None:
    folder = unpacked("transformer-engine==2.20.2", "NVIDIA's reference")
    assert "325 casts, 48 products agree" in run("tests.unit.nvfp4_reference", folder)


def test_torchao_agrees() -> None:
    folder = unpacked("torchao==0.18.0", "PyTorch's emulation of MXFP8 and NVFP4")
    output = run("tests.unit.torchao_reference", folder)
    assert "48 MXFP8 casts, 12 MXFP8 products, 24 NVFP4 casts agree" in output


def test_a_block_by_hand() -> None:
    """Tensor maximum 2688, so that the tensor's scale is 1; block maxima 2688, 36 and 0.01."""
    x = torch.zeros(16, 48)
    x[0, 0] = 2688.0
    x[0, 16:24] = torch.tensor([36.0, 18.0, 9.0, 7.6, -1.4, -1.5, 5.0, 27.0])
    x[0, 32:34] = torch.tensor([0.01, 0.005])
    packed = nvfp4.pack(x, nvfp4.ROWWISE)
    # 36 / 6 = 6 is an E4M3 number. 0.01 / 6 = 0.00167 lies nearest to 2^-9 = 0.00195.
    assert packed.scale[0].float().tolist() == [448.0, 6.0, 2.0**-9]
    assert packed.amax.item() == 2688.0
    codes = unpack_nibbles(packed.data)[0]
    # 36/6=6, 18/6=3, 9/6=1.5, 7.6/6=1.27->1.5, -1.4/6=-0.23->-0, -1.5/6=-0.25->-0 (tie to even),
    # 5/6=0.83->1, 27/6=4.5->4.
    assert codes[16:24].tolist() == [7, 5, 3, 3, 8, 8, 2, 6]
    # 0.01 * 512 = 5.12 -> 6 would need more than 5: 6; 0.005 * 512 = 2.56 -> 3.
    assert codes[32:34].tolist() == [7, 5]
    values = nvfp4.dequantize(packed)[0]
    assert values[16:24].tolist() == [36, 18, 9, 9, 0, 0, 6, 24]
    assert values[32:34].tolist() == [6 / 512, 3 / 512]


def definition(x: Tensor, layout: Layout) -> Tensor:
    """q * stored * amax / 2688 from the equations, block by block."""
    amax = x.abs().max().float()
    encode = torch.tensor(2688.0) / amax
    out = torch.empty(x.shape, dtype=torch.float64)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for i in range(0, x.shape[0], layout.height):
        for j in range(0, x.shape[1], layout.width):
            place = slice(i, i + layout.height), slice(j, j + layout.width)
            block = x[place].float()
            stored = block.abs().max() * (encode * (torch.tensor(1.0) / 6))
            stored = stored.clamp(max=448).to(torch.float8_e4m3fn).float()
            y = (block * (1 / (stored * (1 / encode)))).clamp(-6, 6)
            # The nearest level; there are no ties in random data.
            q = levels[(y.abs()[..., None] - levels).abs().argmin(-1)] * y.sign()
            out[place] = q.double() * stored.double() * amax.double() / 2688
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=["1x16", "16x1", "16x16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_definition(layout: Layout, dtype: torch.dtype) -> None:
    x = (torch.randn(48, 64) * torch.randn(48, 1).exp() + 0.011).to(dtype)
    found = nvfp4.quantize(x, layout)
    assert found.values.dtype == torch.bfloat16
    if dtype == torch.float32:
        torch.testing.assert_close(
            found.dequantize().double(), definition(x, layout), rtol=1e-6, atol=0
        )
    packed = nvfp4.pack(x, layout)
    assert packed.data.numel() == x.numel() // 2 and packed.scale.dtype == torch.float8_e4m3fn
    assert torch.equal(nvfp4.unpack(packed).values, found.values)
    again = nvfp4.pack(nvfp4.dequantize(packed), layout)
    assert torch.equal(nvfp4.dequantize(again), nvfp4.dequantize(packed))


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
@pytest.mark.parametrize("form", [nvfp4, mxfp8])
def test_matrices_without_elements(form: Any, shape: tuple[int, int]) -> None:
    for layout in (form.ROWWISE, form.COLUMNWISE, form.SQUARE):
        assert form.quantize(torch.zeros(shape), layout).values.shape == shape
        assert form.dequantize(form.pack(torch.zeros(shape), layout)).shape == shape


def test_square_blocks_serve_both_directions() -> None:
    w = torch.randn(32, 64)
    assert torch.equal(
        nvfp4.quantize(w, nvfp4.SQUARE).values.t(),
        nvfp4.quantize(w.t().contiguous(), nvfp4.SQUARE).values,
    )
    rows, columns = nvfp4.quantize(w, nvfp4.ROWWISE), nvfp4.quantize(w, nvfp4.COLUMNWISE)
    assert not torch.equal(rows.values, columns.values)


def test_spans_do_not_show() -> None:
    """More than one span of rows, the last one short."""
    x = torch.randn(1040, 1024).bfloat16()
    for layout in LAYOUTS:
        whole = nvfp4.quantize(x, layout)
        part = nvfp4.quantize(
            x[-16:], layout, reduce=partial(torch.Tensor.fill_, value=x.abs().max())
        )
        assert torch.equal(whole.values[-16:], part.values)


def test_stacked_tensors_have_scales_of_their_own() -> None:
    x = torch.randn(96, 32) * torch.tensor([1.0] * 32 + [100.0] * 48 + [0.01] * 16)[:, None]
    splits = [32, 0, 48, 16]
    for layout in LAYOUTS:
        stacked = nvfp4.quantize(x, layout, splits=splits)
        assert stacked.amax is not None
        for i, part in enumerate(x.split(splits)):
            if len(part):
                alone = nvfp4.quantize(part, layout)
                rows = slice(sum(splits[:i]), sum(splits[: i + 1]))
                assert torch.equal(stacked.values[rows], alone.values)
                assert alone.amax is not None and stacked.amax[i] == alone.amax
        assert stacked.amax[1] == 0
    with pytest.raises(ValueError, match="expert 1: 24 % 16 = 8"):
        nvfp4.quantize(x, nvfp4.ROWWISE, splits=[72 - 24, 24, 24])


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (4, 4), (16,), (2, 16, 16)])
def test_refused_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        nvfp4.quantize(torch.ones(shape), nvfp4.ROWWISE)


def test_refused_dtype() -> None:
    with pytest.raises(TypeError, match="float64"):
        nvfp4.quantize(torch.ones(16, 16, dtype=torch.float64), nvfp4.ROWWISE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_reaches_the_product(bad: float) -> None:
    x = torch.randn(32, 32)
    x[5, 7] = bad
    left, right = (
        nvfp4.quantize(x, nvfp4.ROWWISE),
        nvfp4.quantize(torch.randn(32, 32), nvfp4.SQUARE),
    )
    for dtype in (torch.bfloat16, torch.float32):
        y = product(left.values, right.values, scales(left, right), dtype)
        assert not y.isfinite().any()


def test_zeros_and_underflow() -> None:
    zeros = nvfp4.quantize(torch.zeros(16, 16), nvfp4.ROWWISE)
    assert (zeros.values == 0).all() and zeros.amax == 0
    x = torch.full((16, 32), 1e-4)
    x[0, 0] = 1e4  # the scale of every other block underflows
    found = nvfp4.quantize(x, nvfp4.ROWWISE).dequantize()
    assert found[0, 0] == 1e4 and (found[1:] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["1x16", "16x1", "16x16"])
def test_stochastic_rounding_is_unbiased(layout: Layout) -> None:
    x = torch.randn(32, 32)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack(
        [nvfp4.quantize(x, layout, generator).dequantize() for _ in range(2000)]
    ).double()
    scale = nvfp4.block_scales(x, layout)
    y = (layout.view(x) * scale.multiplier).view(x.shape)
    inside = y.abs() <= 6  # block scales round, and what they push past 6 saturates
    assert inside.float().mean() > 0.95
    error = (draws.mean(0) - x.double()) / (draws.std(0) / 2000**0.5).clamp(min=1e-4)
    assert error[inside].abs().max() < 5
    assert error[inside].mean().abs() < 4 / inside.sum() ** 0.5
    assert (draws.unique(dim=0).shape[0]) > 1
    nearest = nvfp4.quantize(x, layout).dequantize().double()
    levels = decode(torch.arange(16), E2M1).unique()
    assert ((draws[0] - nearest).abs() <= levels.diff().max() * x.abs().max() / 2.5).all()


def test_hadamard() -> None:
    r = hadamard.matrix(torch.float64)
    assert torch.equal(r @ r.T, torch.eye(16, dtype=torch.float64))
    entries = [[bin(i & j).count("1") % 2 for j in range(16)] for i in range(16)]
    sylvester = 1 - 2 * torch.tensor(entries, dtype=torch.float64)
    signs = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])
    assert torch.equal(r, signs[:, None] * sylvester / 4)
    x, g = torch.randn(2, 64, 24, dtype=torch.float64)
    transformed = hadamard.transform(x)
    for group in range(4):
        rows = slice(16 * group, 16 * group + 16)
        torch.testing.assert_close(transformed[rows], r.T @ x[rows])
    torch.testing.assert_close(hadamard.inverse(transformed), x)
    torch.testing.assert_close(hadamard.transform(g).T @ transformed, g.T @ x)
    spike = torch.zeros(16, 1, dtype=torch.float64)
    spike[3] = 8
    assert (hadamard.transform(spike).abs() == 2).all()
    with pytest.raises(ValueError, match="24 tokens"):
        hadamard.transform(x[:24])
    y = torch.randn(64, 24).bfloat16()
    wanted = torch.einsum("ij,gjf->gif", r.T, y.double().view(4, 16, 24)).reshape(64, 24)
    assert torch.equal(hadamard.transform(y), wanted.bfloat16())


@pytest.mark.parametrize("size", [(16, 16, 16), (32, 48, 80), (256, 512, 128), (16, 1024, 16)])
@pytest.mark.parametrize("exponent", [-140, -80, -20, 0, 20, 80])
def test_product_is_rounded_once(size: tuple[int, int, int], exponent: int) -> None:
    """alpha times the exact sums, in float64, rounded to BF16: with every layout of the factors
    and scales from one that underflows to one that overflows."""
    m, k, n = size
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -1, -3, -6])
    a, b = (levels[torch.randint(11, s)].bfloat16() for s in ((m, k), (k, n)))
    alpha = torch.tensor(1.37 * 2.0**exponent)
    exact = (a.double() @ b.double()).float() * alpha
    out = torch.full((m + 8, n), 7.0).bfloat16()
    product(a, b, alpha, torch.bfloat16, out[4 : m + 4])
    turned = product(a.t().contiguous().t(), b.t().contiguous().t(), alpha, torch.bfloat16)
    for found in (product(a, b, alpha, torch.bfloat16), turned, out[4 : m + 4]):
        assert torch.equal(found, exact.bfloat16())
    assert (out[:4] == 7).all() and (out[m + 4 :] == 7).all()
    assert torch.equal(product(a, b, alpha, torch.float32), exact)
