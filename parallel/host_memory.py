"""Keeps freed memory in the process on a host, as the CUDA caching allocator does on a GPU.

By default glibc gives every large block back to the system and gets it again, zeroed page
by page, at the next operation; for pointwise work on activations that costs more than the
work (measured: 3 to 4 times).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Options of mallopt(3), from glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap and never to shrink it.

    Returns:
        Whether that was possible (it is not with another C library).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(option, value) == 1 for option, value in settings)
