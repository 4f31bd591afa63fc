"""Element formats of block-scaled numbers, and casts to them.

    E2M1  4 bits  +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}           no infinity, no NaN
    E4M3  8 bits  up to 448, smallest 2^-9                  no infinity, NaN
    E5M2  8 bits  up to 57344, smallest 2^-16               infinity, NaN
    E8M0  8 bits  2^-127 ... 2^127, no sign                 NaN

(OCP Microscaling Formats v1.0, section 5.3; NVFP4 uses E2M1 and E4M3.) Casts saturate, as the
`satfinite` conversions of NVIDIA's GPUs do: what is too large, infinities included, becomes the
largest finite value. NaN stays NaN where the format has one.

Rounding to the nearest value works on the exponent alone. A number of 2^e <= |y| < 2^(e+1) has
neighbours 2^(e-m) apart (m mantissa bits). Adding and subtracting 1.5 * 2^(e+23-m) in FP32, whose
own neighbours are then just as far apart, rounds y to them, to nearest, ties to even.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_EXPONENT = 0x7F800000
"""Exponent bits of an FP32 number: as a number, the power of two below it (0 for subnormals)."""


@dataclass(frozen=True)
class ElementFormat:
    """A signed floating-point format of at most 8 bits.

    Attributes:
        mantissa_bits: stored bits of the mantissa.
        min_exponent: exponent of the smallest normal number; below it steps do not shrink.
        largest: largest finite value.
        codes: PyTorch's dtype of a byte of this format; None: PyTorch has none (E2M1).
    """

    name: str
    mantissa_bits: int
    min_exponent: int
    largest: float
    codes: torch.dtype | None = None


E2M1 = ElementFormat("E2M1", 1, 0, 6.0)
E4M3 = ElementFormat("E4M3", 3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = ElementFormat("E5M2", 2, -14, 57344.0, torch.float8_e5m2)

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by their 3-bit code; the fourth bit is the sign."""


def round_(
    y: Tensor,
    form: ElementFormat,
    scratch: Tensor,
    noise: Tensor | None = None,
    smallest: Tensor | None = None,
) -> None:
    """Round y in place to values of `form`, to nearest even or stochastically.

    Args:
        y: FP32, contiguous, |y| at most `form.largest` or NaN (which stays NaN). The sign of a
            zero result is lost.
        scratch: FP32 of the shape of y, contiguous; overwritten.
        noise: odd numbers from -32767 to 32767, FP32, of the shape of y: y is rounded to one of
            its two neighbours, with a probability that falls linearly with the distance. None:
            to nearest, ties to even.
        smallest: y is rounded to values of `form` times powers of two, and this, broadcast
            against y, is the smallest normal number times its power; None: the powers are 1.
    """
    torch.bitwise_and(y.view(torch.int32), _EXPONENT, out=scratch.view(torch.int32))
    if smallest is None:
        scratch.clamp_(min=2.0**form.min_exponent)
    else:
        torch.maximum(scratch, smallest, out=scratch)
    if noise is not None:
        # Less than half a step either way: a value of the format never moves, and no sum is a tie.
        y.addcmul_(noise, scratch, value=2.0 ** -(form.mantissa_bits + 16))
    magic = 1.5 * 2.0 ** (23 - form.mantissa_bits)
    y.add_(scratch, alpha=magic).sub_(scratch, alpha=magic)


def stochastic_noise(count: int, generator: torch.Generator) -> Tensor:
    """`count` draws for `round_`: int16, odd, uniform from -32767 to 32767.

    16 random bits an element, one of them given up so that the mean is exactly zero.
    """
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    bits.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    return bits.view(torch.int16)[:count].bitwise_or_(1)


def cast(x: Tensor, form: ElementFormat, generator: torch.Generator | None = None) -> Tensor:
    """The values of `form` that x is rounded to, as FP32 of the shape of x.

    Args:
        x: FP32, BF16 or FP16.
        generator: round stochastically with its draws; None: to nearest, ties to even.

    Raises:
        TypeError: x is neither FP32, BF16 nor FP16.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"a cast to {form.name} takes FP32, BF16 or FP16, not {x.dtype}")
    y = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    y.clamp_(-form.largest, form.largest)
    noise = None
    if generator is not None:
        noise = stochastic_noise(y.numel(), generator).view(y.shape).float()
    round_(y, form, torch.empty_like(y), noise)
    return y.copysign_(x)


def encode(values: Tensor, form: ElementFormat) -> Tensor:
    """Codes, uint8, of FP32 or BF16 values that `cast` returned; E2M1 in the low four bits.

    Raises:
        ValueError: a NaN, for E2M1, which has none.
    """
    if form.codes is not None:
        return values.to(form.codes).view(torch.uint8)
    if values.isnan().any():
        raise ValueError("E2M1 has no NaN")
    levels = values.new_tensor(E2M1_VALUES)
    magnitudes = torch.searchsorted(levels, values.abs().contiguous(), out_int32=True)
    return magnitudes.to(torch.uint8) | values.signbit().to(torch.uint8) << 3


def decode(codes: Tensor, form: ElementFormat) -> Tensor:
    """FP32 values of uint8 codes."""
    if form.codes is not None:
        return codes.view(form.codes).float()
    values = torch.tensor(
        E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=torch.float32, device=codes.device
    )
    return values[codes.int()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """[..., n] codes of four bits -> [..., n / 2] bytes, the even element in the low nibble.

    Raises:
        ValueError: n is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} codes of four bits do not fill whole bytes")
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode_e8m0(
    x: Tensor, rounding: str = "nearest", generator: torch.Generator | None = None
) -> Tensor:
    """Biased exponents, uint8, of the powers of two that x is rounded to; 255 is NaN.

    Args:
        x: FP32. Zero becomes the smallest power, 2^-127, as in Transformer Engine.
        rounding: "up" (Transformer Engine's `float_to_e8m0`, for block scales), "nearest"
            (half way between two powers: the greater, an even multiple of the other), or
            "stochastic" (the mean of many draws is x).
        generator: of the draws; only with "stochastic".

    Infinity becomes 2^127; NaN and negative numbers become NaN.

    Raises:
        ValueError: an unknown rounding, or a stochastic one without a generator.
    """
    bits = x.float().view(torch.int32)
    # A subnormal is its mantissa times 2^-149: 2^-127 is half way up.
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    subnormal = exponent == 0
    mantissa = torch.where(subnormal, (mantissa - 0x400000).clamp_(min=0) * 2, mantissa)
    if rounding == "up":
        up = mantissa > 0
    elif rounding == "nearest":
        up = mantissa >= 0x400000
    elif rounding == "stochastic" and generator is not None:
        draws = torch.empty_like(mantissa).random_(0, 1 << 23, generator=generator)
        up = draws < mantissa
    else:
        raise ValueError(
            f"rounding={rounding!r}; use 'up', 'nearest', or 'stochastic' with a generator"
        )
    codes = (exponent + up.int()).clamp_(max=254)
    invalid = x.isnan() | (x < 0)
    return torch.where(invalid, 255, codes).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """FP32 powers of two of biased exponents; 255 -> NaN."""
    exponent = codes.int()
    # 2^-127 is subnormal in FP32: half of 2^-126.
    bits = torch.where(exponent == 0, 0x400000, exponent << 23)
    return torch.where(exponent == 255, 0x7FC00000, bits).view(torch.float32)
