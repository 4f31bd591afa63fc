"""The Mamba-2 path against Hugging Face's in PyTorch, and its memory against the length.

    python -m tests.benchmarks.scan                      # both, a table each
    python -m tests.benchmarks.scan --shapes tiny --dtypes bf16 --rounds 7 --no-memory

Speed: convolution, scan, gate and norm, forward and backward, of one mixer without its two
projections, on the same input and the same threads, the two taking turns. Hugging Face's is
`NemotronHMamba2Mixer` with its projections replaced by the identity and its clamp of dt lifted.
Its outputs are compared with ours first. This must run in a process without our stand-ins, which
transformers would take for the real mamba_ssm.

Memory: peak resident size of a process that runs forward and backward once, for lengths that
double; a straight line through them is what is expected.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.mamba_ssm_standin import RMSNorm, mamba_split_conv1d_scan_combined

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHUNK_SIZE = 128


class Shape(NamedTuple):
    """Sizes of one mixer and its input."""

    batch: int
    length: int
    heads: int
    head_dim: int
    state_dim: int
    groups: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def width(self) -> int:
        """Of the packed [z x B C dt]."""
        return 2 * self.inner + 2 * self.groups * self.state_dim + self.heads


SHAPES = {
    "tiny": Shape(8, 256, 8, 32, 32, 2),
    "tiny-narrow": Shape(4, 512, 8, 16, 16, 2),
    "small": Shape(2, 1024, 24, 64, 64, 4),
    "small-wide": Shape(2, 1024, 32, 64, 128, 8),
    "super": Shape(1, 1024, 128, 64, 128, 8),
}

MEMORY_LENGTHS = (8192, 16384, 32768, 65536)
MEMORY_SHAPE = Shape(1, 0, 8, 64, 64, 2)


def hugging_face_mixer(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """Convolution, scan, gate and norm of transformers, from the packed input to the norm."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    config = NemotronHConfig(
        hidden_size=64,
        mamba_num_heads=shape.heads,
        mamba_head_dim=shape.head_dim,
        ssm_state_size=shape.state_dim,
        n_groups=shape.groups,
        chunk_size=CHUNK_SIZE,
        layers_block_type=["mamba"],
    )
    mixer = NemotronHMamba2Mixer(config, 0).to(dtype)
    mixer.in_proj, mixer.out_proj = nn.Identity(), nn.Identity()
    mixer.time_step_limit = (0.0, float("inf"))
    with torch.no_grad():
        mixer.dt_bias.copy_(torch.linspace(-7, -2, shape.heads))  # steps from 0.001 to 0.1
        mixer.A_log.copy_(torch.linspace(0, 2.7, shape.heads))  # rates from 1 to 15
    return mixer.eval()  # in training mode it only looks for a fused kernel first


class OurMixer(nn.Module):
    """The same as Megatron-Core's mixer calls it, with the parameters of the other one."""

    def __init__(self, shape: Shape, mixer: Any) -> None:
        super().__init__()
        self.shape = shape
        self.conv1d_weight = nn.Parameter(mixer.conv1d.weight.detach().squeeze(1).clone())
        self.conv1d_bias = nn.Parameter(mixer.conv1d.bias.detach().clone())
        self.dt_bias = nn.Parameter(mixer.dt_bias.detach().clone())
        self.A_log = nn.Parameter(mixer.A_log.detach().clone())
        self.D = nn.Parameter(mixer.D.detach().clone())
        group_size = shape.inner // shape.groups
        self.norm = RMSNorm(shape.inner, mixer.norm.variance_epsilon, group_size, False)
        self.norm.to(self.D.dtype)

    def forward(self, zxbcdt: Tensor) -> Tensor:
        y = mamba_split_conv1d_scan_combined(
            zxbcdt,
            self.conv1d_weight,
            self.conv1d_bias,
            self.dt_bias.float(),
            -torch.exp(self.A_log.float()),
            self.D,
            CHUNK_SIZE,
            headdim=self.shape.head_dim,
            ngroups=self.shape.groups,
            norm_before_gate=False,
        )
        assert isinstance(y, Tensor)
        return self.norm(y)


def seconds(run: Callable[[Tensor], Tensor], zxbcdt: Tensor) -> float:
    """Forward and backward once."""
    start = time.perf_counter()
    y = run(zxbcdt)
    y.backward(torch.ones_like(y))
    zxbcdt.grad = None
    return time.perf_counter() - start


def compare_speed(name: str, dtype_name: str, rounds: int) -> str:
    """One line of the table: the best time of each, and the median ratio of `rounds` pairs."""
    shape, dtype = SHAPES[name], DTYPES[dtype_name]
    torch.manual_seed(0)
    theirs = hugging_face_mixer(shape, dtype)
    ours = OurMixer(shape, theirs)
    zxbcdt = torch.randn(shape.batch, shape.length, shape.width).to(dtype).requires_grad_()
    with torch.no_grad():
        a, b = theirs(zxbcdt), ours(zxbcdt)
    error = float((a - b).norm() / a.norm())
    pairs = [(seconds(theirs, zxbcdt), seconds(ours, zxbcdt)) for _ in range(rounds + 1)][1:]
    best_theirs, best_ours = (min(column) for column in zip(*pairs, strict=True))
    # Other work on a shared machine slows the two of a pair alike: the ratio is taken there.
    ratio = statistics.median(a / b for a, b in pairs)
    return (
        f"{name:12} {dtype_name:5} {best_theirs * 1e3:12.1f} {best_ours * 1e3:8.1f} "
        f"{ratio:7.1f}x {error:10.1e}"
    )


def peak_memory(length: int) -> float:
    """Peak resident megabytes of this process after one forward and backward pass."""
    shape = MEMORY_SHAPE._replace(length=length)
    channels = shape.inner + 2 * shape.groups * shape.state_dim
    zxbcdt = torch.randn(1, length, shape.width, requires_grad=True)
    rows = torch.full((shape.heads,), -1.0)
    y = mamba_split_conv1d_scan_combined(
        zxbcdt,
        torch.randn(channels, 4),
        torch.randn(channels),
        rows,
        rows,
        rows,
        CHUNK_SIZE,
        headdim=shape.head_dim,
        ngroups=shape.groups,
    )
    assert isinstance(y, Tensor)
    y.backward(torch.ones_like(y))
    # Not getrusage: its ru_maxrss starts at the parent's peak, which exec does not reset.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return float(peak[1]) / 1024


def print_memory() -> None:
    """Each length in a process of its own, since a peak never goes down again."""
    print(f"\n{'tokens':>8} {'peak MB':>9} {'over the first, per token':>26}")
    first = None
    for length in MEMORY_LENGTHS:
        command = [sys.executable, "-m", "tests.benchmarks.scan", "--peak-memory", str(length)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = float(result.stdout)
        first = first or (length, peak)
        extra = (peak - first[1]) / max(1, length - first[0]) * 1024
        print(f"{length:8} {peak:9.0f} {extra:23.1f} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "small"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak-memory", type=int, metavar="LENGTH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_memory:
        print(peak_memory(options.peak_memory))
        return
    print(f"{options.threads} threads; best milliseconds, forward and backward; median ratio")
    print(
        f"{'shape':12} {'dtype':5} {'transformers':>12} {'ours':>8} {'ratio':>8} {'rel. diff':>10}"
    )
    for name in options.shapes:
        for dtype_name in options.dtypes:
            print(compare_speed(name, dtype_name, options.rounds), flush=True)
    if not options.no_memory:
        print_memory()


if __name__ == "__main__":
    main()
