"""Limits the memory that the C library keeps after it was freed."""

import ctypes

ARENAS = 2
"""Heaps that all threads share. By default glibc creates eight for each CPU, and threads cannot use the free memory of
another heap: a server under load held 12 MiB more. Python's threads allocate one at a time anyway."""

_M_ARENA_MAX = -8  # from malloc.h

_libc = ctypes.CDLL(None)


def share_arenas() -> None:
    """Bounds the heaps of this process. Call it before threads are started."""
    mallopt = getattr(_libc, "mallopt", None)  # other C libraries have no arenas, or limit them
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, ARENAS)


def trim() -> None:
    """Gives the memory that is free back to the system. Takes some milliseconds, without the interpreter's lock."""
    if (malloc_trim := getattr(_libc, "malloc_trim", None)) is not None:
        malloc_trim(0)
