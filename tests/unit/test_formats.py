"""Element casts against ml_dtypes, PyTorch's own float8 types and enumerated tables."""

import ml_dtypes
import numpy as np
import pytest
import torch

from precision import formats
from precision.formats import E2M1, E4M3, E5M2, ElementFormat

TYPES = {
    "E2M1": (E2M1, ml_dtypes.float4_e2m1fn),
    "E4M3": (E4M3, ml_dtypes.float8_e4m3fn),
    "E5M2": (E5M2, ml_dtypes.float8_e5m2),
}


def every_bf16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def tricky_fp32() -> torch.Tensor:
    """Every BF16 number and its neighbours in FP32 on both sides: ties and just off ties."""
    x = every_bf16().float()
    x = x[~x.isnan()]
    return torch.cat((x, x.nextafter(x.new_tensor(3e38)), x.nextafter(x.new_tensor(-3e38))))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("source", ["bf16", "fp32"])
def test_nearest_against_ml_dtypes(name: str, source: str) -> None:
    form, theirs = TYPES[name]
    x = every_bf16() if source == "bf16" else tricky_fp32()
    x = x[~x.isnan()]
    clamped = x.float().clamp(-form.largest, form.largest).numpy()  # ours saturates
    wanted = torch.from_numpy(clamped.astype(theirs).astype(np.float32))
    found = formats.cast(x, form)
    assert torch.equal(found, wanted)
    assert torch.equal(found.signbit(), wanted.signbit())
    codes = formats.encode(found, form)
    assert np.array_equal(codes.numpy(), clamped.astype(theirs).view(np.uint8))
    assert torch.equal(formats.decode(codes, form), found)


def test_e2m1_table() -> None:
    """All 16 codes, each midpoint (to the even code), and what lies beyond."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = formats.decode(torch.arange(16), E2M1)
    assert table.tolist() == values + [-v for v in values]
    assert table[8].signbit()
    midpoints = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 7.0: 6, 1e30: 6}
    x = torch.tensor(list(midpoints))
    assert formats.cast(x, E2M1).tolist() == list(midpoints.values())
    assert formats.cast(-x, E2M1).tolist() == [-v for v in midpoints.values()]


@pytest.mark.parametrize("form", [E2M1, E4M3, E5M2])
def test_special_values(form: ElementFormat) -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan")])
    found = formats.cast(x, form)
    assert found[:2].tolist() == [form.largest, -form.largest] and found[2].isnan()
    if form is E2M1:
        with pytest.raises(ValueError, match="NaN"):
            formats.encode(found, form)
    else:
        assert formats.decode(formats.encode(found, form), form)[2].isnan()
    with pytest.raises(TypeError, match="float64"):
        formats.cast(x.double(), form)


@pytest.mark.parametrize("form", [E2M1, E4M3, E5M2])
def test_stochastic_rounding(form: ElementFormat) -> None:
    """Only the two neighbours, exact values never, and the mean of many draws is the value."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.arange(256 if form.codes else 16, dtype=torch.uint8)
    exact = formats.decode(codes, form)
    exact = exact[exact.isfinite()]
    levels = exact.unique()
    many = exact.expand(2000, -1)
    assert torch.equal(formats.cast(many, form, generator).unique(dim=0), exact[None])

    x = torch.rand(300, generator=generator) * 4 - 2
    draws = 20_000
    found = formats.cast(x.expand(draws, -1), form, generator)
    above = levels[torch.searchsorted(levels, x)]
    below = levels[torch.searchsorted(levels, x) - 1]
    assert ((found == above) | (found == below)).all()
    chance = (x - below) / (above - below)
    error = (found == above).double().mean(0) - chance
    sigma = (chance * (1 - chance) / draws).sqrt().clamp(min=1e-4)
    assert (error / sigma).abs().max() < 5
    assert (error / sigma).mean().abs() < 4 / 300**0.5


def test_stochastic_rounding_continues_from_a_saved_state() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1000)
    state = generator.get_state()
    first = formats.cast(x, E2M1, generator)
    assert not torch.equal(first, formats.cast(x, E2M1, generator))
    generator.set_state(state)
    assert torch.equal(first, formats.cast(x, E2M1, generator))


def test_e8m0_nearest_against_ml_dtypes() -> None:
    x = tricky_fp32()
    # Below 2^-126 ml_dtypes takes the bits of a subnormal for a mantissa; zero is NaN there.
    x = x[(x >= 2.0**-126) & x.isfinite() & (x < 1.5 * 2.0**127)]
    wanted = x.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    found = formats.encode_e8m0(x)
    assert np.array_equal(found.numpy(), wanted)
    decoded = torch.from_numpy(
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    )
    mine = formats.decode_e8m0(torch.arange(256))
    assert torch.equal(mine[:255], decoded[:255]) and mine[255].isnan()


def test_e8m0_up() -> None:
    """The smallest power of two that is not smaller, by search in float64."""
    x = tricky_fp32()
    x = x[(x > 0) & x.isfinite()]
    powers = torch.arange(-127, 128, dtype=torch.float64).exp2()
    wanted = torch.searchsorted(powers, x.double()).clamp(max=254)
    assert torch.equal(formats.encode_e8m0(x, "up").long(), wanted)
    special = torch.tensor([0.0, float("inf"), float("nan"), -1.0])
    assert formats.encode_e8m0(special, "up").tolist() == [0, 254, 255, 255]


def test_e8m0_stochastic() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([1.0, 1.25, 1.5, 3.5, 0.3])
    found = formats.decode_e8m0(formats.encode_e8m0(x.expand(40_000, -1), "stochastic", generator))
    assert (found[:, 0] == 1).all()
    torch.testing.assert_close(found.mean(0), x, rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="generator"):
        formats.encode_e8m0(x, "stochastic")


def test_nibbles() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    packed = formats.pack_nibbles(codes)
    assert packed[0].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert torch.equal(formats.unpack_nibbles(packed), codes)
    with pytest.raises(ValueError, match="7 codes"):
        formats.pack_nibbles(codes[:, :7])
