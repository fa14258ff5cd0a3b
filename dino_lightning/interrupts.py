"""What Ctrl-C does to a program, from its first line to its last: one sentence and no traceback, also when repeated.

Imported before anything else by the files that start a program, so it imports next to nothing.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SECONDS_TO_END = 2.0  # for removing unfinished files after a second Ctrl-C
EXIT_CODE = 130  # 128 plus the signal's number: how shells say that a signal ended a process


class CtrlC:
    """Handles SIGINT: raises `KeyboardInterrupt` the first time, and at the second gives the program seconds to end.

    The second time nothing is raised, as that would interrupt what removes unfinished files after the first.

    Attributes:
        presses: how often it came.
        told: whether the user has been told that the program was interrupted.
        exit_code: that of the program once it has ended, when nothing is left to interrupt; None before.
    """

    def __init__(self) -> None:
        self.presses, self.told = 0, False
        self.exit_code: int | None = None
        self._process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        if os.getpid() != self._process:  # a forked process, which the terminal's Ctrl-C reaches too
            signal.default_int_handler(number, frame)
        self.presses += 1
        if self.presses == 1 and self.exit_code is None:
            signal.default_int_handler(number, frame)
        # not `threading`: the thread that is interrupted may hold one of its locks
        _thread.start_new_thread(self._end_soon, ())

    def _end_soon(self) -> None:
        time.sleep(SECONDS_TO_END)
        if not self.told and self.exit_code is None:
            _tell()
        os._exit(EXIT_CODE if self.exit_code is None else self.exit_code)


def handle_ctrl_c() -> None:
    """Handle Ctrl-C from here on, to the end of this process; for files that start a program."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, CtrlC())
        sys.excepthook, sys.unraisablehook = _uncaught, _unraisable


def ctrl_c_came() -> bool:
    """Whether Ctrl-C has come to this process, and ends it, as far as `CtrlC` handles it."""
    handler = signal.getsignal(signal.SIGINT)
    return isinstance(handler, CtrlC) and handler.presses > 0


def ended(exit_code: int) -> int:
    """Note that the program's work is done: Ctrl-C must not disturb Python's own end; returns the exit code."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, CtrlC):
        handler.exit_code = exit_code
    return exit_code


def _uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """While a program is imported, for example, nothing catches Ctrl-C yet."""
    if issubclass(kind, KeyboardInterrupt):
        _tell()
    else:
        sys.__excepthook__(kind, error, traceback)


def _tell() -> None:
    """At any moment, so by the system alone; the other processes of a run say nothing."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"\nInterrupted.\n")


def _unraisable(problem: Any) -> None:
    """Python prints an error that it cannot raise, as in `__del__`; Ctrl-C is none."""
    if not issubclass(problem.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(problem)


@contextmanager
def ctrl_c_left_to_this_process() -> Iterator[None]:
    """Processes that are started inside never get Ctrl-C, which a terminal sends to all: their parent ends them.

    The signal is held back here for that time, as children inherit what is held back, and never get it, unless they
    call `let_ctrl_c_in`.
    """
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_ctrl_c_in() -> None:
    """Get Ctrl-C from here on, and at once if it came before, in a process that was started with it held back.

    So a process of which Python itself still starts when Ctrl-C comes has no traceback.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
