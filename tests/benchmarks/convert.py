"""Conversion speed and memory, beside a plain copy of the same bytes on the same disk.

    python -m tests.benchmarks.convert --folder /a/disk/with/room

makes a slice of Super at full width (d = 4096, 512 experts in a latent width of 1024) in the
Hugging Face format, converts it to Megatron's and back, each in a process of its own, and prints
one JSON object: the ratio of the throughput to that of `cp` with a sync, and the peak memory as a
multiple of the largest file. Needs four times the slice's 8 GB; less with `--experts 64`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.conversion.config import config_json
from model.conversion.safetensors_files import SINGLE, write_file
from model.conversion.table import pairs
from recipes.compose import load_recipe
from recipes.schema import ModelConfig


def slice_of_super(pattern: str, experts: int, vocabulary: int) -> ModelConfig:
    """Super with fewer layers."""
    changes = (
        f"model.hybrid_layer_pattern='{pattern}'",
        f"model.num_moe_experts={experts}",
        f"model.vocab_size={vocabulary}",
    )
    return load_recipe(["experiment=super_120b_a12b", *changes]).model


def make(model: ModelConfig, folder: Path) -> int:
    """Write the slice with arbitrary values; returns its bytes."""
    folder.mkdir(parents=True)
    plan = pairs(model)

    def dtype(fp32: bool) -> torch.dtype:
        return torch.float32 if fp32 else torch.bfloat16

    def values() -> Iterator[Tensor]:
        noise = torch.randn(1 << 20).bfloat16()
        for pair in plan:
            for spec in pair.hf:
                count = torch.Size(spec.shape).numel()
                flat = noise.repeat(-(-count // len(noise)))[:count]
                yield flat.view(spec.shape).to(dtype(pair.row.fp32))

    entries = [(s.name, dtype(p.row.fp32), s.shape) for p in plan for s in p.hf]
    write_file(folder / SINGLE, entries, values())
    (folder / "config.json").write_text(json.dumps(config_json(model, "bfloat16")))
    return (folder / SINGLE).stat().st_size


def convert(direction: str, source: Path, target: Path, *options: str) -> dict[str, float]:
    """Run the command; seconds by its own account and in all, and its peak memory in bytes."""
    before = time.perf_counter()
    words = [sys.executable, "-m", "model.convert", direction, str(source), str(target), *options]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{direction} failed"
    own = json.loads((target / "conversion.json").read_text())["seconds"]
    return {
        "seconds": own,
        "seconds_in_all": time.perf_counter() - before,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def copy(folder: Path, target: Path) -> float:
    """Seconds of a plain copy that ends when it is on the disk."""
    drop_caches(folder)
    before = time.perf_counter()
    shutil.copytree(folder, target)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - before


def drop_caches(folder: Path) -> None:
    """Let the next reader get the files from the disk."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.convert")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--pattern", default="ME*")
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--shard-gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    root: Path = chosen.folder / "convert_benchmark"
    shutil.rmtree(root, ignore_errors=True)
    options = (
        f"convert.shard_gigabytes={chosen.shard_gigabytes}",
        f"convert.workers={chosen.workers}",
    )
    try:
        model = slice_of_super(chosen.pattern, chosen.experts, chosen.vocabulary)
        size = make(model, root / "hf")
        result: dict[str, object] = {"gigabytes": size / 1e9, "pattern": chosen.pattern}
        copies = [copy(root / "hf", root / "copy")]
        shutil.rmtree(root / "copy")
        drop_caches(root / "hf")
        measured = {"from_hf": convert("from_hf", root / "hf", root / "native", *options)}
        drop_caches(root / "native")
        measured["to_hf"] = convert("to_hf", root / "native", root / "back", *options)
        shutil.rmtree(root / "hf")
        copies.append(copy(root / "back", root / "copy"))
        seconds = sum(copies) / len(copies)
        result["copy_megabytes_per_second"] = size / seconds / 1e6
        for direction, figures in measured.items():
            target = root / ("native" if direction == "from_hf" else "back")
            largest = max(f.stat().st_size for f in target.iterdir() if f.is_file())
            result[direction] = {
                "ratio_to_copy": round(seconds / figures["seconds_in_all"], 3),
                "peak_gigabytes": round(figures["peak_bytes"] / 1e9, 2),
                "peak_over_largest_file": round(figures["peak_bytes"] / largest, 2),
            }
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
