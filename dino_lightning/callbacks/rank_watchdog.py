"""Ends all processes of a run soon after one of them has died, and says which one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning

from dino_lightning.callbacks.saving import GracefulCheckpoint
from dino_lightning.interrupts import (
    EXIT_CODE,
    SECONDS_TO_END,
    ctrl_c_came,
    ctrl_c_left_to_this_process,
    let_ctrl_c_in,
)

SECONDS_TO_FIND_OUT = 10.0  # which rank died, after a connection broke
SIGNS_OF_A_LOST_PEER = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "gloo",
    "nccl",
    "socket",
    "timed out",
)


FIRST_PROCESS = "DINO_LIGHTNING_FIRST_PROCESS"  # tells the processes that Lightning starts who has started them


class RankWatchdog(threading.Thread):
    """Ends this process soon after another rank has died, and says which one.

    Under DDP as Lightning starts it, the first process starts the others. When one of them is killed, the rest would
    wait for it in a collective operation, for minutes or forever.

    Args:
        children: the processes that this one has started: (rank, process) pairs.
        parent: the id of the process that started this one, or None if its end does not matter.
        end: called with the exit code to end this process.

    Attributes:
        interrupted: what to say when Ctrl-C has ended another rank while this one waited for it.
        leaving: set as soon as Ctrl-C ends this process by itself.
    """

    def __init__(
        self, children: list[tuple[int, Any]], parent: int | None, end: Callable[[int], Any] = os._exit
    ) -> None:
        super().__init__(daemon=True, name="rank-watchdog")
        self.children, self.parent, self.end = children, parent, end
        self.interrupted: Callable[[], str] = lambda: "Interrupted."
        self.leaving = threading.Event()

    def run(self) -> None:
        """Check twice a second until there is nothing left to watch."""
        while not self.look():
            time.sleep(0.5)

    def look(self) -> bool:
        """Check the processes once; returns whether there is nothing left to watch."""
        if self.parent is not None and os.getppid() != self.parent:
            self._die("Rank 0 is gone")
        for rank, process in self.children:
            code = process.poll()
            if code in (EXIT_CODE, -signal.SIGINT):  # Ctrl-C came to this process as well, which may wait for that one
                if self.leaving.wait(SECONDS_TO_END) or self._is_leaving():
                    return True
                self._kill_children()
                print(f"\n{self.interrupted()}", file=sys.stderr, flush=True)
                self.end(EXIT_CODE)
            elif code and self._is_leaving():  # this process ends the others
                return True
            elif code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed (its error is above)"
                self._kill_children()
                self._die(f"Rank {rank} {how}")
        return self.parent is None and all(process.poll() == 0 for _, process in self.children)

    def _kill_children(self) -> None:
        for _, process in self.children:
            process.kill()

    def _is_leaving(self) -> bool:
        return self.leaving.is_set() or ctrl_c_came()

    def _die(self, cause: str) -> None:
        if self._is_leaving():
            self.end(EXIT_CODE)
            return
        print(
            f"error: {cause}; stopping all ranks. Resume from the last checkpoint with --ckpt_path last.",
            file=sys.stderr,
            flush=True,
        )
        self.end(1)


def watch_first_process() -> None:
    """In a process that Lightning has started: end it soon after the first one is gone, and let Ctrl-C in.

    `WatchProcesses` begins only when the processes have found each other, which they never do if the first one is
    killed while this one still starts.
    """
    first = os.environ.get(FIRST_PROCESS)
    if first and os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        let_ctrl_c_in()
        RankWatchdog([], int(first)).start()


def hold_back_ctrl_c_in_new_processes(trainer: lightning.Trainer) -> None:
    """Let Lightning start the other processes with Ctrl-C held back; `watch_first_process` lets it in again."""
    launcher = trainer.strategy.launcher
    start = getattr(launcher, "_call_children_scripts", None)
    if start is None:
        return

    def start_without_ctrl_c() -> None:
        with ctrl_c_left_to_this_process():
            start()

    launcher._call_children_scripts = start_without_ctrl_c  # type: ignore[union-attr]  # Lightning has no other place


class WatchProcesses(lightning.Callback):
    """Starts a `RankWatchdog` where Lightning, and not torchrun, has started the processes."""

    def __init__(self) -> None:
        self._watchdog: RankWatchdog | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Start the watchdog; Lightning has started the other processes by now."""
        launcher = trainer.strategy.launcher
        started = getattr(launcher, "procs", None)
        if started:
            self._watchdog = RankWatchdog(list(enumerate(started, start=1)), None)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set where mypy does not see it
                if isinstance(callback, GracefulCheckpoint):
                    self._watchdog.interrupted = callback.interrupted
        elif trainer.world_size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ and trainer.local_rank > 0:
            self._watchdog = RankWatchdog([], os.getppid())
        if self._watchdog is not None:
            _retire_lightnings_observer()
            self._watchdog.start()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leave Ctrl-C to this process itself; when a connection broke, give the watchdog time to find who died."""
        if isinstance(exception, KeyboardInterrupt):
            for thread in threading.enumerate():
                if isinstance(thread, RankWatchdog):
                    thread.leaving.set()
        elif self._watchdog is not None and any(sign in str(exception).lower() for sign in SIGNS_OF_A_LOST_PEER):
            self._watchdog.join(SECONDS_TO_FIND_OUT)


def _retire_lightnings_observer() -> None:
    """Leave the watching to the watchdog: Lightning's own thread ends this process by SIGKILL, without saying why."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):  # Lightning 2.6
            thread._child_processes = []  # with nothing to watch, it ends
