"""What quantising a matrix costs, beside a copy of it.

    python -m tests.benchmarks.quantize                       # 4096 tokens x 1024 features
    python -m tests.benchmarks.quantize --tokens 1024 --features 512 --dtype fp32

One line a cast: nanoseconds an element and the multiple of a plain copy, the median of rounds in
which all take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from precision import hadamard, mxfp8, nvfp4

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def casts(x: Tensor) -> dict[str, Callable[[], object]]:
    """Every cast that training needs of x, by name; the copy first."""
    draws = torch.Generator().manual_seed(0)
    rotated = hadamard.transform(x)
    return {
        "copy": x.clone,
        "nvfp4 rows": lambda: nvfp4.quantize(x, nvfp4.ROWWISE),
        "nvfp4 rows, stochastic": lambda: nvfp4.quantize(x, nvfp4.ROWWISE, draws),
        "nvfp4 columns": lambda: nvfp4.quantize(rotated, nvfp4.COLUMNWISE),
        "nvfp4 columns, stochastic": lambda: nvfp4.quantize(rotated, nvfp4.COLUMNWISE, draws),
        "nvfp4 16x16": lambda: nvfp4.quantize(x, nvfp4.SQUARE),
        "hadamard": lambda: hadamard.transform(x),
        "mxfp8 rows": lambda: mxfp8.quantize(x, mxfp8.ROWWISE),
        "mxfp8 columns": lambda: mxfp8.quantize(x, mxfp8.COLUMNWISE),
    }


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds a call, after one call each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.features).to(DTYPES[options.dtype])
    found = measure(casts(x), options.rounds)
    print(
        f"{options.dtype} [{options.tokens}, {options.features}], {torch.get_num_threads()} threads"
    )
    print(f"{'cast':28}{'ns/element':>12}{'x copy':>9}")
    for name, seconds in found.items():
        print(f"{name:28}{seconds / x.numel() * 1e9:12.2f}{seconds / found['copy']:9.1f}")


if __name__ == "__main__":
    main()
