"""A part of a test in which file permissions bind this process, whoever runs the tests."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

VERSION = 0x20080522  # of the two structures below, see capget(2)
PASSES_PERMISSIONS = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, which let root read and write everything


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def permissions_count() -> Iterator[bool]:
    """Inside, this thread and the processes it forks may only do what the permissions of files allow.

    Root gives up what lets it pass them, and takes it back at the end; anybody else is bound already. Gives whether
    that is so: it is not for root on a system without Linux's capabilities.
    """
    if os.name != "posix" or os.geteuid() != 0:
        yield os.name == "posix"
        return
    before = None
    with suppress(OSError, AttributeError):
        before = _capabilities()
        _set(before[0].effective & ~PASSES_PERMISSIONS, before)
    try:
        yield before is not None
    finally:
        if before is not None:
            _set(before[0].effective, before)


def _capabilities() -> ctypes.Array[_Sets]:
    found = (_Sets * 2)()
    _call("capget", found)
    return found


def _set(effective: int, others: ctypes.Array[_Sets]) -> None:
    wanted = (_Sets * 2)(*others)
    wanted[0] = _Sets(effective, others[0].permitted, others[0].inheritable)
    _call("capset", wanted)


def _call(name: str, sets: ctypes.Array[_Sets]) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(ctypes.byref(_Header(VERSION, 0)), sets):
        raise OSError(ctypes.get_errno(), name)
