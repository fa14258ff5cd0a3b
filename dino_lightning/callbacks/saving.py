"""Saves checkpoints during training and stops it on request: all ranks at the same step, files complete or absent.

A signal reaches one process, or all, at any moment. Lightning's own handler broadcasts from inside the handler, which
can block forever, and its loop asks all ranks before each batch. Here a signal handler only sets a flag, and every few
seconds, between two steps, the ranks ask each other whether anyone has it set.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dino_lightning.errors import CheckpointError
from dino_lightning.files import advice_on, atomic_write, previous_checkpoint, reason_of, remove_unfinished
from dino_lightning.weights.reading import read_checkpoint

SECONDS_BETWEEN_POLLS = 5.0
MOST_BATCHES_BETWEEN_POLLS = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedOnRequest(Exception):
    """Training was stopped on request, and the checkpoint is written.

    Attributes:
        step: optimizer steps done.
        signal_number: the signal that asked, SIGTERM if it was the flag file.
        checkpoint: the one to resume from.
    """

    def __init__(self, step: int, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.signal_number, self.checkpoint = step, signal_number, checkpoint


class GracefulCheckpoint(lightning.Callback):
    """Saves a checkpoint at intervals; when asked to stop, saves one and raises `StoppedOnRequest`.

    SIGINT (Ctrl-C) and SIGTERM ask to stop, on any rank, and so does a flag file. A second signal ends the process at
    once. Saving between two steps does not change the training that follows.

    Args:
        checkpoint: where to save.
        every_minutes: minutes between two saves; 0 for none.
        every_steps: optimizer steps between two saves; 0 for none.
        flag: a file that asks to stop as soon as it exists.
    """

    def __init__(
        self, *, checkpoint: Path, every_minutes: float = 0.0, every_steps: int = 0, flag: Path | None = None
    ) -> None:
        self.checkpoint, self.flag = checkpoint, flag
        self.every_minutes, self.every_steps = every_minutes, every_steps
        self._signal = 0
        self._stopped: StoppedOnRequest | None = None
        self._handling = self._owed = False
        self._second_ctrl_c: Callable[[int, FrameType | None], Any] = signal.default_int_handler
        self._step = 0
        self._batches_to_poll = self._interval = 1
        self._last_poll = self._last_save = time.monotonic()

    # ------------------------------------------------------------------ signals

    @property
    def asked_by(self) -> int:
        """The signal that asked this process to stop; 0 if none has."""
        return self._signal

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remove what a killed process left, and switch off two parts of Lightning's loop that do harm here."""
        if trainer.is_global_zero:
            remove_unfinished(self.checkpoint.parent, ".ckpt")
        loop = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            # Lightning 2.6: before each batch it asks all ranks for a SIGTERM, a device synchronisation
            loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]  # it has no switch
        if hasattr(trainer.fit_loop, "_iteration_based_training"):
            # Lightning 2.6: with max_steps, a resumed run would end its last epoch once more
            trainer.fit_loop._iteration_based_training = _never  # type: ignore[method-assign]  # it has no switch

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the best checkpoint of a run folder that was moved; Lightning forgets it in another folder."""
        if trainer.ckpt_path is None or Path(trainer.ckpt_path).resolve().parent != self.checkpoint.resolve().parent:
            return
        for key, state in checkpoint.get("callbacks", {}).items():
            if key.startswith("ModelCheckpoint"):
                checkpoint["callbacks"][key] = _moved(state, str(state.get("dirpath")), self.checkpoint.parent)

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set the signal handlers; Lightning has set its own by now."""
        self._handle_signals()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set the signal handlers, in case there is no sanity check, and start the clock."""
        self._handle_signals()
        self._step = trainer.global_step
        self._last_save = time.monotonic()

    def _handle_signals(self) -> None:
        if not self._handling and threading.current_thread() is threading.main_thread():
            self._handling = True  # Lightning restores the former handlers when the run ends
            before = signal.getsignal(signal.SIGINT)
            self._second_ctrl_c = before if callable(before) else signal.default_int_handler
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, self._stop_at_once)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"\n{signal.Signals(number).name}: saving a checkpoint after this step, then stopping. "
                "A second signal stops at once.",
                file=sys.stderr,
                flush=True,
            )

    def _stop_at_once(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._second_ctrl_c)
        try:
            self._second_ctrl_c(number, frame)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.interrupted()) from None

    def interrupted(self) -> str:
        """What to say when the run ends at once: one sentence, with how to resume."""
        if not self.checkpoint.exists():
            return "Interrupted before a checkpoint was saved."
        return f"Interrupted; resume from the last checkpoint that was saved with --ckpt_path {self.checkpoint}."

    # ------------------------------------------------------------------ steps

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Ask the other ranks at the first batch: the pace may have changed."""
        self._batches_to_poll = 1

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop if it is time, and ask the other ranks at the first batch."""
        self._raise_if_stopped()
        self._batches_to_poll = 1

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop if it is time; the metrics of the last step are logged by now."""
        self._raise_if_stopped()

    def _raise_if_stopped(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save or stop if it is time.

        Not after the last batch of an epoch, where Lightning would resume with the next epoch; not between batches
        whose gradients are accumulated, which would be lost; and not before a validation within an epoch, which
        Lightning would skip when resuming. In these cases it happens after the next step.
        """
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and self.every_steps and trainer.global_step % self.every_steps == 0:
            self._owed = True
        if batch_idx + 1 >= trainer.num_training_batches:
            self._owed = False  # the end of the epoch saves
            return
        if not stepped or _validation_follows(trainer, batch_idx):
            return
        stop, due = self._poll(trainer)
        if stop:
            self._save(trainer)
            self._stopped = StoppedOnRequest(trainer.global_step, stop, self.checkpoint)
        elif due or self._owed:
            self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if asked to: an evaluation may take longer than the time that is left before a kill."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        stop, _ = self._poll(trainer)
        if stop:
            # Lightning would resume in the middle of the evaluation and evaluate only the rest of the images, or skip
            # it. In this state (first batch started, none done) it starts the evaluation again.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            self._save(trainer)
            raise StoppedOnRequest(trainer.global_step, stop, self.checkpoint)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.checkpoint)  # on all ranks: it ends with a barrier
        self._last_save, self._owed = time.monotonic(), False

    def _poll(self, trainer: lightning.Trainer) -> tuple[int, bool]:
        """The signal that asks to stop (or 0), and whether it is time to save; the same on all ranks."""
        stop = int(signal.SIGTERM) if self.flag is not None and self.flag.exists() else self._signal
        now = time.monotonic()
        due = self.every_minutes > 0 and now - self._last_save > 60 * self.every_minutes
        if trainer.world_size == 1:
            return stop, due
        self._batches_to_poll -= 1
        if self._batches_to_poll > 0:
            return 0, False
        # One collective operation: the requests, and the pace of the slowest rank, which sets the next interval.
        asked = [float(stop), float(due), (now - self._last_poll) / self._interval]
        asked_by_any = trainer.strategy.reduce(
            torch.tensor(asked, device=trainer.strategy.root_device), reduce_op="max"
        )
        assert isinstance(asked_by_any, torch.Tensor)
        stop_any, due_any, seconds_per_batch = asked_by_any.tolist()
        pace = SECONDS_BETWEEN_POLLS / max(seconds_per_batch, 1e-6)
        self._interval = self._batches_to_poll = int(min(max(pace, 1), MOST_BATCHES_BETWEEN_POLLS))
        self._last_poll = now
        return int(stop_any), bool(due_any)


def _nothing() -> None:
    pass


def _never() -> bool:
    return False


def _moved(value: Any, before: str, now: Path) -> Any:
    """A callback's state in which paths within the folder `before` are within the folder `now`."""
    if isinstance(value, dict):
        return {_moved(key, before, now): _moved(content, before, now) for key, content in value.items()}
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return os.path.realpath(now) + value[len(before) :]
    return value


def _validation_follows(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether a validation comes between this batch and the next of its epoch."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not isinstance(every, int) or not trainer.enable_validation:
        return False
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return (batch_idx + 1) % every == 0 and (trainer.current_epoch + 1) % epochs == 0


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it, keeps the previous `last.ckpt`, and reads safely.

    Whatever interrupts it, a checkpoint is complete or absent, and there is always a complete `last.ckpt` or
    `previous.ckpt`. Code in a checkpoint is never run, whatever Lightning's default.
    """

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint into host memory.

        Raises:
            CheckpointError: see `read_checkpoint`.
        """
        content: dict[str, Any] = read_checkpoint(path)
        return content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            CheckpointError: it cannot be written; what was there before is still there.
        """
        path = Path(path)
        try:
            with atomic_write(path) as temporary:
                with temporary.open("wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.name == "last.ckpt" and path.exists():
                    _link(path, previous_checkpoint(path))
        except OSError as error:
            kept = "; the last one that was saved is intact" if path.exists() else ""
            raise CheckpointError(
                f"The checkpoint {path} could not be written ({reason_of(error)}){kept}. {advice_on(error)}, then "
                "resume with --ckpt_path last."
            ) from error


def _link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, which may then be replaced."""
    temporary = target.with_name(f"{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links: there is only one checkpoint
        return
    temporary.replace(target)
