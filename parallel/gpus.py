"""GPUs a plan can be made for: data-sheet peaks, without sparsity.

Sources: NVIDIA's data sheets of H100 SXM, H200 SXM, HGX B200, HGX B300, GB200 NVL72 and GB300
NVL72 (dense figures; where a sheet gives sparse ones, half of them), memory as sold. NVLink is
one direction: half of the advertised figure. The network is one 400 Gb/s adapter a GPU (800 Gb/s
for the B300 generation), as in NVIDIA's reference systems.
"""

from dataclasses import dataclass

from recipes.rules import one_of


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU."""

    bf16: float
    """FLOP/s of dense BF16 matrix products."""
    mxfp8: float
    """The same in MXFP8; where there is none, BF16's."""
    nvfp4: float
    """The same in NVFP4; where there is none, BF16's."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s it sends inside its NVLink domain."""
    domain: int
    """GPUs of an NVLink domain."""
    network: float
    """Bytes/s it sends to other domains."""


GPUS = {
    "h100": Gpu(989e12, 989e12, 989e12, 80e9, 3.35e12, 450e9, 8, 50e9),
    "h200": Gpu(989e12, 989e12, 989e12, 141e9, 4.8e12, 450e9, 8, 50e9),
    "b200": Gpu(2250e12, 4500e12, 9000e12, 180e9, 7.7e12, 900e9, 8, 50e9),
    "b300": Gpu(2250e12, 4500e12, 13500e12, 270e9, 7.7e12, 900e9, 8, 100e9),
    "gb200": Gpu(2500e12, 5000e12, 10000e12, 186e9, 8.0e12, 900e9, 72, 50e9),
    "gb300": Gpu(2500e12, 5000e12, 15000e12, 279e9, 8.0e12, 900e9, 72, 100e9),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of `cluster.gpu`.

    Raises:
        ConfigError: there is no such GPU in the table.
    """
    one_of("cluster.gpu", name, tuple(GPUS))
    return GPUS[name]
