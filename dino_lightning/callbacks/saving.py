"""Saving while a run goes on, and stopping it on request: all processes at the same step, files whole or absent.

A signal reaches one process, or all, at any moment; Lightning's own handler broadcasts from inside the handler, which
can wait for ever, and its loop asks all processes before each batch. Here a signal only leaves a note, and the
processes ask each other every few seconds, between two steps, whether anyone has one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dino_lightning.errors import CheckpointError
from dino_lightning.files import atomic_write, previous_checkpoint, remove_unfinished
from dino_lightning.weights.reading import read_checkpoint

SECONDS_BETWEEN_POLLS = 5.0
MOST_BATCHES_BETWEEN_POLLS = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedOnRequest(Exception):
    """Training was stopped on request, and the checkpoint is written.

    Attributes:
        step: optimizer steps done.
        signal_number: the signal that asked, SIGTERM if it was the flag file.
        checkpoint: where the run can be gone on with.
    """

    def __init__(self, step: int, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped at step {step}")
        self.step, self.signal_number, self.checkpoint = step, signal_number, checkpoint


class GracefulCheckpoint(lightning.Callback):
    """Saves a checkpoint every so often, and saves one and raises `StoppedOnRequest` when the run is asked to stop.

    SIGINT (ctrl-C) and SIGTERM ask for it, on any process, and so does a flag file. A second signal ends the process at
    once. A save between two steps costs the run nothing but its time: what follows is the same as without it.

    Args:
        checkpoint: where to save.
        every_minutes: how often to save, by the clock; 0 for never.
        every_steps: how often to save, by optimizer steps; 0 for never.
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
        self._step = 0
        self._batches_to_poll = self._interval = 1
        self._last_poll = self._last_save = time.monotonic()

    # ------------------------------------------------------------------ signals

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Tidy up after a process that was killed, and take over what Lightning does in ways that harm."""
        if trainer.is_global_zero:
            remove_unfinished(self.checkpoint.parent, ".ckpt")
        loop = trainer.fit_loop.epoch_loop
        if hasattr(loop, "_broadcast_sigterm_tensor"):
            # Lightning 2.6; before each batch it asks all processes for a SIGTERM, a wait for the device
            loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]  # it has no switch
        if hasattr(trainer.fit_loop, "_iteration_based_training"):
            # Lightning 2.6; with max_steps, a run that goes on would end its last epoch once more
            trainer.fit_loop._iteration_based_training = _never  # type: ignore[method-assign]  # it has no switch

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a run folder that has been moved keep its best checkpoint, which Lightning forgets in any other place."""
        if trainer.ckpt_path is None or Path(trainer.ckpt_path).resolve().parent != self.checkpoint.resolve().parent:
            return
        for key, state in checkpoint.get("callbacks", {}).items():
            if key.startswith("ModelCheckpoint"):
                checkpoint["callbacks"][key] = _moved(state, str(state.get("dirpath")), self.checkpoint.parent)

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """From here on signals leave a note; Lightning has set its own handlers by now."""
        self._handle_signals()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """As before the sanity check, which may be left out."""
        self._handle_signals()
        self._step = trainer.global_step
        self._last_save = time.monotonic()

    def _handle_signals(self) -> None:
        if not self._handling and threading.current_thread() is threading.main_thread():
            self._handling = True  # Lightning puts the former handlers back when the run ends
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"\n{signal.Signals(number).name}: saving a checkpoint after this step, then stopping. "
                "Once more stops at once.",
                file=sys.stderr,
                flush=True,
            )

    # ------------------------------------------------------------------ steps

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Poll at the first batch: the pace may be another one."""
        self._batches_to_poll = 1

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """As at the start of an epoch."""
        self._raise_if_stopped()
        self._batches_to_poll = 1

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, now that the figures of the last step are logged."""
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
        """Save or stop, where it is due.

        Not after the last batch of an epoch, where Lightning would go on with the next epoch, not between batches whose
        gradients are accumulated, which would be lost, and not before a validation within an epoch, which Lightning
        would pass over when going on; then after the next step.
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
        """Stop, where that is due: an evaluation may take longer than whoever asks is willing to wait."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        stop, _ = self._poll(trainer)
        if stop:
            # Lightning would take up the evaluation in its middle and judge the rest of the images alone, or pass over
            # it. In this state it begins anew: started with its first batch, nothing done.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
            self._save(trainer)
            raise StoppedOnRequest(trainer.global_step, stop, self.checkpoint)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.checkpoint)  # on all processes: it ends with a barrier
        self._last_save, self._owed = time.monotonic(), False

    def _poll(self, trainer: lightning.Trainer) -> tuple[int, bool]:
        """(the signal that asks to stop or 0, whether the clock says to save), the same on all processes."""
        stop = int(signal.SIGTERM) if self.flag is not None and self.flag.exists() else self._signal
        now = time.monotonic()
        due = self.every_minutes > 0 and now - self._last_save > 60 * self.every_minutes
        if trainer.world_size == 1:
            return stop, due
        self._batches_to_poll -= 1
        if self._batches_to_poll > 0:
            return 0, False
        # One collective for all: what is asked for, and the pace of the slowest, from which all take the next interval.
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
    """A callback's state with the paths in the folder `before` in the folder `now`."""
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
    """Writes checkpoints to a temporary name and renames them, keeps the one before `last.ckpt`, and reads them safely.

    Whatever interrupts it, a checkpoint is whole or absent, and of `last.ckpt` there is always one that is whole. No
    code in a checkpoint is run, whatever Lightning's default.
    """

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint to the host.

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
        except (OSError, RuntimeError) as error:
            reason = _what_the_system_says(error)
            if reason is None:
                raise
            kept = "; the last one that was saved is intact" if path.exists() else ""
            raise CheckpointError(
                f"The checkpoint {path} could not be written ({reason}){kept}. Make room, then go "
                "on with --ckpt_path last."
            ) from error


def _what_the_system_says(error: BaseException | None) -> str | None:
    """The reason in an error of the system, or in one behind which PyTorch's own complaint hides it."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__context__
    return None


def _link(source: Path, target: Path) -> None:
    """Let `target` be the same file as `source`, which then may be replaced."""
    temporary = target.with_name(f"{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links: one checkpoint has to do
        return
    temporary.replace(target)
