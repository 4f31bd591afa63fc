"""Compares precision.nvfp4 with NVIDIA's `NVFP4QuantizerRef`, bit for bit.

    python -m tests.unit.nvfp4_reference FOLDER    # with an unpacked transformer-engine wheel

Runs in a process of its own: the reference is loaded from the wheel without its package, whose
import needs the compiled library; of that only two base classes are missed. Prints a line with the
number of comparisons, or fails.
"""

import importlib
import sys
import types
from itertools import product as every
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precision import hadamard, nvfp4
from precision.blocks import Layout
from precision.formats import E2M1, cast
from precision.operand import product, scales

KINDS = ("normal", "wide", "zeros", "outlier", "tiny", "huge", "ties", "nan", "infinity")


def load_reference(folder: Path) -> Any:
    """The module reference_nvfp4, its package stubbed around it."""

    def package(name: str, *path: str) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = list(path)
        sys.modules[name] = module
        return module

    class Quantizer:
        def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    root = "transformer_engine.pytorch"
    package("transformer_engine")
    package(root)
    package(f"{root}.custom_recipes", str(folder / "transformer_engine/pytorch/custom_recipes"))
    bases: Any = package(f"{root}.quantized_tensor")
    bases.Quantizer, bases.QuantizedTensorStorage = Quantizer, object
    package(f"{root}.tensor")
    utilities: Any = package(f"{root}.tensor.utils")
    utilities.is_custom = lambda tensor: True
    return importlib.import_module(f"{root}.custom_recipes.reference_nvfp4")


def quantizer(reference: Any, tile: tuple[int, int], rht: bool) -> Any:
    return reference.NVFP4QuantizerRef(
        dtype=reference.reference_utils.Fp4Formats.E2M1, quant_tile_shape=tile, with_rht=rht
    )


def matrix(kind: str, rows: int, columns: int) -> Tensor:
    x = torch.randn(rows, columns)
    if kind == "wide":
        x *= torch.exp(4 * torch.randn(rows, columns))
    elif kind == "zeros":
        x.zero_()[1, 2] = -0.0
    elif kind == "outlier":
        x[0, 0] = 1e30
    elif kind == "tiny":
        x *= 1e-39
    elif kind == "huge":
        x *= 1e37
    elif kind == "ties":
        x = torch.randint(-24, 25, (rows, columns)) / 4.0
        x[::16, 0] = x[0, ::16] = 6.0
    elif kind == "nan":
        x[3, 5] = float("nan")
    elif kind == "infinity":
        x[3, 5] = float("inf")
    return x


def same(found: Tensor, wanted: Tensor, what: object) -> None:
    """Equal, NaN equal to NaN whatever its bits."""
    a, b = found.float(), wanted.float()
    assert a.shape == b.shape, what
    assert torch.equal(a.isnan(), b.isnan()), what
    assert torch.equal(a.nan_to_num(0, 1e38, -1e38), b.nan_to_num(0, 1e38, -1e38)), what


def compare_casts(reference: Any) -> int:
    """Packed codes, block scales and maxima."""
    layouts: tuple[tuple[tuple[int, int], bool, Layout], ...] = (
        ((1, 16), False, nvfp4.ROWWISE),
        ((1, 16), False, nvfp4.COLUMNWISE),
        ((1, 16), True, nvfp4.COLUMNWISE),
        ((16, 16), False, nvfp4.SQUARE),
    )
    shapes = ((16, 32), (48, 80), (160, 96))
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    count = 0
    for kind, shape, dtype, (tile, rht, layout) in every(KINDS, shapes, dtypes, layouts):
        what = (kind, shape, dtype, rht, layout)
        x = matrix(kind, *shape).to(dtype)
        theirs = quantizer(reference, tile, rht).quantize(x)
        ours = nvfp4.pack(hadamard.transform(x) if rht else x, layout)
        transposed = layout is nvfp4.COLUMNWISE
        suffix = "_t" if transposed else ""
        same(ours.data, getattr(theirs, f"data{suffix}"), what)
        same(ours.scale, getattr(theirs, f"scale{suffix}"), what)
        amax = theirs.global_amax_col if transposed else theirs.global_amax_row
        same(ours.amax, amax, what)
        count += 1
    x = torch.linspace(-6, 6, 64001).view(-1, 1).repeat(1, 2)
    codes = reference.cast_to_fp4x2(x)
    assert torch.equal(reference.cast_from_fp4x2(codes, torch.float32), cast(x, E2M1))
    return count + 1


def compare_products(reference: Any) -> int:
    """Output, data gradient and weight gradient of one Linear; sums of random data are exact in
    FP32, so that their order does not matter."""
    count = 0
    gemm = importlib.import_module("transformer_engine.pytorch.custom_recipes.gemm").GEMMType
    ref = quantizer(reference, (1, 16), True)
    square = quantizer(reference, (16, 16), False)
    for dtype, _ in every((torch.bfloat16, torch.float32), range(8)):
        tokens, inputs, outputs = (int(n) * 32 for n in torch.randint(1, 9, (3,)))
        x, g = torch.randn(tokens, inputs).to(dtype), (torch.randn(tokens, outputs) / 1e4).to(dtype)
        w = (torch.randn(outputs, inputs) / 20).to(dtype)
        a, b, c = ref.quantize(x), square.quantize(w), ref.quantize(g)

        def theirs(left: Any, right: Any, way: Any, s: str, t: str, dtype: Any = dtype) -> Tensor:
            values = getattr(left, f"data{s}"), getattr(right, f"data{t}")
            factors = getattr(left, f"scale{s}"), getattr(right, f"scale{t}")
            return ref.qgemm(
                *values, None, dtype, *factors, gemm_type=way, qresult_x=left, qresult_w=right
            )

        xr, wq, gr = (
            nvfp4.quantize(t, layout)
            for t, layout in ((x, nvfp4.ROWWISE), (w, nvfp4.SQUARE), (g, nvfp4.ROWWISE))
        )
        xc, gc = (nvfp4.quantize(hadamard.transform(t), nvfp4.COLUMNWISE) for t in (x, g))
        y = product(xr.values, wq.values.t(), scales(xr, wq), dtype)
        dx = product(gr.values, wq.values, scales(gr, wq), dtype)
        dw = product(gc.values.t(), xc.values, scales(gc, xc), dtype)
        assert torch.equal(y, theirs(a, b, gemm.FPROP, "", ""))
        assert torch.equal(dx, theirs(c, b, gemm.DGRAD, "", "_t"))
        assert torch.equal(dw, theirs(c, a, gemm.WGRAD, "_t", "_t"))
        count += 3
    return count


def main(folder: str) -> None:
    torch.manual_seed(0)
    reference = load_reference(Path(folder))
    print(f"{compare_casts(reference)} casts, {compare_products(reference)} products agree")


if __name__ == "__main__":
    main(sys.argv[1])
