"""How the launcher is asked to stop, and how it ends the processes that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dino_lightning.interrupts import let_ctrl_c_in

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PROCESSES = Path("/proc")


class StopRequested(Exception):
    """SIGTERM or Ctrl-C arrived before training began."""


class StopAtOnce(BaseException):
    """A second Ctrl-C arrived in the midst of work that does not look at `at_once`; see `StopSignal.raised`."""


class StopSignal:
    """Handles SIGTERM and Ctrl-C: `at` is the time of the first one, None before; `at_once` after a second Ctrl-C.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.at: float | None = None
        self.at_once = False
        self._raises = False
        self._say = say
        for number in SIGNALS:
            signal.signal(number, self._remember)
        let_ctrl_c_in()  # `launch --local` starts this process with it held back

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.at is None:
            self.at = time.monotonic()
            self._say(f"received {signal.Signals(number).name}: saving a checkpoint and stopping")
        elif number == signal.SIGINT:
            self.at_once = True
            if self._raises:
                raise StopAtOnce

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise `StopAtOnce` inside, where the program is, when a second Ctrl-C arrives."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def check(self) -> None:
        """Raise `StopRequested` if a signal has arrived."""
        if self.at is not None:
            raise StopRequested


def run_child(command: Sequence[str], stop: StopSignal) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output.

    Raises:
        StopRequested: a stop signal arrived first; the command is killed.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        while child.poll() is None:
            time.sleep(0.1)
            if stop.at is not None:
                kill(child)
                raise StopRequested
        output.seek(0)
        return subprocess.CompletedProcess(list(command), child.returncode, output.read())


def kill(child: subprocess.Popen[Any]) -> None:
    """Kill a process that has a session of its own, and all that it has started.

    torchrun gives each training process a session of its own, so killing its session alone would leave them training.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGSTOP)  # so that it starts no more of them
        for group in {*_groups_below(child.pid), child.pid} - {os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
    child.wait()


def _groups_below(parent: int) -> set[int]:
    """The process groups of all descendants of a process."""
    children: dict[int, list[tuple[int, int]]] = {}
    for process, its_parent, group in _processes():
        children.setdefault(its_parent, []).append((process, group))
    groups, left = set(), [parent]
    while left:
        for process, group in children.get(left.pop(), ()):
            groups.add(group)
            left.append(process)
    return groups


def _processes() -> list[tuple[int, int, int]]:
    """(id, parent, group) of the processes of this machine: from /proc, and where there is none from `ps`."""
    if not (PROCESSES / "self" / "stat").is_file():
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid="], capture_output=True, text=True, check=False)
        rows = (line.split() for line in listed.stdout.splitlines())
        return [(int(process), int(parent), int(group)) for process, parent, group in rows]
    found = []
    for path in PROCESSES.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            # "pid (name) state ppid pgrp ...": the name may hold blanks and brackets
            _, parent, group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            found.append((int(path.parent.name), int(parent), int(group)))
    return found
