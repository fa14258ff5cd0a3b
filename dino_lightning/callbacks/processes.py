"""Processes of one run end together, soon after one of them has died, and say which."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning

SECONDS_TO_FIND_OUT = 10.0
SIGNS_OF_A_LOST_PEER = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "gloo",
    "nccl",
    "socket",
    "timed out",
)


class RankWatchdog(threading.Thread):
    """Ends this process soon after one that it cannot go on without has died, and says which.

    Under DDP as Lightning starts it, the first process starts the others. Where one of them is killed, the rest would
    wait for it in a collective, for minutes or for ever.

    Args:
        children: the processes that this one has started: (rank, process) pairs.
        parent: the id of the process that started this one, if that must live.
        end: what ends this process.
    """

    def __init__(
        self, children: list[tuple[int, Any]], parent: int | None, end: Callable[[int], Any] = os._exit
    ) -> None:
        super().__init__(daemon=True, name="end-together")
        self.children, self.parent, self.end = children, parent, end

    def run(self) -> None:
        """Look twice a second."""
        while not self.look():
            time.sleep(0.5)

    def look(self) -> bool:
        """Look once; whether there is nothing more to look for."""
        if self.parent is not None and os.getppid() != self.parent:
            self._die("The first training process is gone")
        for rank, process in self.children:
            code = process.poll()
            if code:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed, as it says above"
                for _, other in self.children:
                    other.kill()
                self._die(f"Training process {rank} {how}")
        return self.parent is None and all(process.poll() == 0 for _, process in self.children)

    def _die(self, cause: str) -> None:
        print(
            f"error: {cause}; the others end with it. Go on from the last checkpoint with --ckpt_path last.",
            file=sys.stderr,
            flush=True,
        )
        self.end(1)


class WatchProcesses(lightning.Callback):
    """Starts `RankWatchdog` where Lightning has started the processes."""

    def __init__(self) -> None:
        self._watch: RankWatchdog | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """The others exist by now."""
        launcher = trainer.strategy.launcher
        started = getattr(launcher, "procs", None)
        if started:
            self._watch = RankWatchdog(list(enumerate(started, start=1)), None)
        elif trainer.world_size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ and trainer.local_rank > 0:
            self._watch = RankWatchdog([], os.getppid())
        if self._watch is not None:
            self._watch.start()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Where a connection broke, wait for the watch to find out whose fault it was; it then ends this process."""
        if self._watch is not None and any(sign in str(exception).lower() for sign in SIGNS_OF_A_LOST_PEER):
            self._watch.join(SECONDS_TO_FIND_OUT)
