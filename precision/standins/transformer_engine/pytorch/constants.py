"""Tags of data types."""

import enum


class DType(enum.IntEnum):
    """Data types of quantized tensors; the values are the real library's."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10
