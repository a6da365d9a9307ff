"""Memory that a step of training frees is kept for the next one, as torch does on a GPU.

glibc gives large tensors back to the system as soon as they are freed, and the next step pays for each of their pages again.
"""

from __future__ import annotations

import ctypes

# Of malloc.h. Thresholds in bytes: what is larger is mapped on its own, more than so much free memory at the top is given back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what this process frees. Returns whether it will; elsewhere there is nothing to tell.

    Source:
        mallopt(3), Linux manual pages.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE - 1))
