"""The stack on which this thread handles signals, kept as it is while OpenVINO loads its plugins.

OpenVINO's plugin for the CPU gives the thread that loads it another one, and puts back what was there when it is
unloaded. Of two that are unloaded in the order in which they were loaded, the second puts back the stack of the first,
which is freed by then. Python handles signals on that stack since 3.11, so the next one, of Ctrl-C or of a child that
has ended, kills the process without a word.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of sigaltstack(2) on Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Put this thread's signal stack back in the end; where OpenVINO sets none, on other systems, nothing is done."""
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)
