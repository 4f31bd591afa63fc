"""Keeps freed memory in the process on a host, as the CUDA caching allocator does on a GPU, and
lets a forked one go without it.

By default glibc gives every large block back to the system and gets it again, zeroed page
by page, at the next operation; for pointwise work on activations that costs more than the
work (measured: 3 to 4 times). Large pages make what is left of it cheap (measured: 6 us for
each page of 4 KiB that is touched the first time, in a virtual machine).
"""

import contextlib
import ctypes
import os
import sys

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""In the environment of a process when it starts: large pages for blocks outside the heap too."""

LONG = 1 << 16
"""So many tokens of a rank are a long sequence."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
"""Options of mallopt(3), from glibc's malloc.h."""
_LARGEST_THRESHOLD = 32 << 20
"""glibc takes no larger one."""

_MADV_HUGEPAGE = 14
"""Advice of madvise(2)."""
_HUGE_PAGE = 2 << 20


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from its heap, never to shrink it, and to use large
    pages for it where the kernel has them.

    Returns:
        Whether that was possible (it is not with another C library).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    if not all(mallopt(option, value) == 1 for option, value in settings):
        return False
    _use_large_pages(libc)
    return True


def give_back_activations(tokens: int, hidden_size: int) -> None:
    """For a long sequence of a rank, let blocks of the size of an activation ([tokens, hidden_size]
    in 16 bits) go back to the system when they are freed.

    A heap that has kept blocks of many large sizes has holes that none of them fits in (measured,
    tiny: 53 KiB a token of a rank instead of 29). New pages cost time (15 % at 16,384 tokens), so
    shorter sequences, which fit anyway, keep theirs.
    """
    size = min(tokens * hidden_size * 2, _LARGEST_THRESHOLD)
    if tokens < LONG or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, size)
        libc.mallopt(_M_MMAP_MAX, 1 << 16)
        libc.malloc_trim(0)  # a block comes from the heap while there is room in it


def go_without() -> None:
    """In a forked process: give up the freed memory that it shares with its parent.

    The parent waits for a copy of each shared page that it writes to (measured: 3 us of 4 KiB, in a
    virtual machine), but not of those that are its own again.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _use_large_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap to the size of the machine's memory and ask for large pages there. Nothing
    of it is touched, so nothing of it is used yet; where the system refuses, pages stay
    small."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(start, block + size - start, _MADV_HUGEPAGE)
    libc.free(block)
