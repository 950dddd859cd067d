"""Memory that stays with a rank from one training step to the next.

What backward frees glibc gives back to the system, to ask for it again in the next step: page by page, each
filled with zeros, thousands of times a step (``scripts/benchmarks/bench_allocator.py`` counts them). A step's peak is
reached in every step, so to keep the memory in between costs nothing at the peak.
"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_freed_memory", "release_freed_memory"]

# What users set to decide themselves; or glibc.malloc.trim_threshold and others in GLIBC_TUNABLES.
VARIABLES = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_TRIM_THRESHOLD_",
)

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST_MMAP_THRESHOLD = (4 << 20) * ctypes.sizeof(ctypes.c_long)  # 32 MiB: glibc takes no more


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, but for arrays above 32 MiB. Local.

    Does nothing where the user has decided (see :data:`VARIABLES`), or the C library is another one.

    Returns:
        Whether freed memory is kept.
    """
    library = _glibc()
    if library is None:
        return False
    return bool(
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        and library.mallopt(_TRIM_THRESHOLD, _NEVER)
    )


def release_freed_memory() -> None:
    """Give back what is free now: after set-up, which frees what no step needs again. Local."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library, if this module may set options of its allocator."""
    chosen = any(name in os.environ for name in VARIABLES)
    if chosen or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
