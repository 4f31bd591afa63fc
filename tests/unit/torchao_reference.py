"""Compares MXFP8 and NVFP4 with torchao's emulations.

    python -m tests.unit.torchao_reference FOLDER    # with an unpacked torchao wheel

Runs in a process of its own, so that torchao is not seen by anything else. MXFP8 values must be
equal bit for bit, and the three products of a linear layer up to the order of FP32 sums. NVFP4
codes and scales of FP32 data must be equal. torchao multiplies by a reciprocal where NVIDIA's
kernels divide, so a tie may go the other way: of BF16 data, where ties are common, one code in
200 may be one off, and one scale in 100.
"""

import sys
from itertools import product as every
from typing import Any

import torch
from torch import Tensor

from model.backends import install_backends

SHAPES = ((32, 64), (64, 96), (128, 32), (96, 160))


def matrix(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(rows, columns)
    if kind == "wide":
        x *= torch.exp(2 * torch.randn(rows, columns))
    elif kind == "small":
        x *= 1e-6
    return x.to(dtype)


def mxfp8_casts() -> int:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    from precision import mxfp8

    count = 0
    kinds, dtypes = ("normal", "wide", "small"), (torch.float32, torch.bfloat16)
    for kind, shape, dtype, across in every(kinds, SHAPES, dtypes, (False, True)):
        x = matrix(kind, *shape, dtype)
        theirs = MXTensor.to_mx(
            (x.t() if across else x).contiguous(),
            torch.float8_e4m3fn,
            32,
            scaling_mode=ScaleCalculationMode.RCEIL,
        ).dequantize(torch.float32)
        layout = mxfp8.COLUMNWISE if across else mxfp8.ROWWISE
        ours = mxfp8.quantize(x, layout).values.float()
        assert torch.equal(ours, theirs.t() if across else theirs), (kind, shape, dtype, across)
        count += 1
    return count


def mxfp8_products() -> int:
    import transformer_engine.pytorch as te
    from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear
    from torchao.quantization.quantize_.common import KernelPreference
    from transformer_engine.common.recipe import MXFP8BlockScaling

    count = 0
    for kind, (rows, columns) in every(("normal", "wide", "small"), SHAPES):
        theirs = MXFP8Linear(columns, 128, bias=False, kernel_preference=KernelPreference.EMULATED)
        ours = te.Linear(columns, 128, bias=False, params_dtype=torch.float32)
        with torch.no_grad():
            ours.weight.copy_(theirs.weight)
        x, dy = (matrix(kind, rows, n, torch.float32) for n in (columns, 128))
        found: list[Any] = []
        for layer in (ours, theirs):
            inputs = x.clone().requires_grad_()
            with te.autocast(recipe=MXFP8BlockScaling()):
                y = layer(inputs)
            y.backward(dy)
            found.append((y.detach(), inputs.grad, layer.weight.grad))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6 * float(other.abs().max()))
        count += 1
    return count


def nvfp4_casts() -> int:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    from precision import nvfp4
    from precision.formats import unpack_nibbles

    count = 0
    kinds, dtypes = ("normal", "wide", "small"), (torch.float32, torch.bfloat16)
    for kind, shape, dtype in every(kinds, SHAPES, dtypes):
        x = matrix(kind, *shape, dtype)
        scale, data = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.float().abs().max()))
        ours = nvfp4.pack(x, nvfp4.ROWWISE)
        same = ours.scale.float().flatten() == scale.float().flatten()
        mine, other = (unpack_nibbles(d).reshape(-1, 16)[same].int() for d in (ours.data, data))
        off = (mine & 7) - (other & 7)
        if dtype is torch.float32:
            assert same.all() and torch.equal(mine, other), (kind, shape)
        else:  # eight bits make ties common
            assert same.float().mean() > 0.99 and off.abs().max() <= 1, (kind, shape)
            assert (off != 0).float().mean() < 5e-3, (kind, shape)
        count += 1
    return count


def main() -> None:
    sys.path.append(sys.argv[1])
    install_backends("host")
    torch.manual_seed(0)
    print(
        f"{mxfp8_casts()} MXFP8 casts, {mxfp8_products()} MXFP8 products, "
        f"{nvfp4_casts()} NVFP4 casts agree"
    )


if __name__ == "__main__":
    main()
