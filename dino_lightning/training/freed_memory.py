"""Memory of freed tensors on a CPU: kept for the next step, rather than given back to the system and taken again."""

from __future__ import annotations

import ctypes
import os
import sys

# Of mallopt(3), in glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}  # bytes


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that tensors on the CPU free, in this process, from now on.

    Every step has the same large tensors. Those of 32 MB and more glibc takes from the system each time and gives back,
    and the system fills each of their pages with zeros before the first write: a seventh of a step's time in the
    model of `small_cpu` (benchmarks/RESULTS.md). The process stays as large as it once was, and larger where sizes vary
    from step to step: what was freed then fits less often.

    Returns:
        Whether it was done: not where the C library is another one, nor where a MALLOC_ or GLIBC_TUNABLES variable of
        the environment says that somebody has made choices.
    """
    if not sys.platform.startswith("linux") or any(
        name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ
    ):
        return False
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return False
        return all([library.mallopt(name, value) == 1 for name, value in _SETTINGS.items()])
    except (OSError, AttributeError):
        return False
