"""From what the user gives for a checkpoint (a file, the folder of a run, `last`) to a file, for every command."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dino_lightning.cli.command import expected_errors
from dino_lightning.console import say
from dino_lightning.errors import CheckpointError, UsageError
from dino_lightning.files import previous_checkpoint

RUNS = Path("runs")
LAST = "last"
HELP = "a checkpoint, the folder of a run or of a model, or 'last': the newest run in runs/"


def newest_run() -> Path:
    """The folder of the run in `RUNS` that saved a checkpoint last.

    Raises:
        UsageError: there is none.
    """
    saved = sorted(RUNS.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise UsageError(f"--ckpt_path last: no run in {RUNS}/ has a checkpoint; name the run with --run_dir.")
    return saved[-1].parent.parent


def model_file(given: str | Path) -> Path:
    """The file to use a model from: of a run its best checkpoint, or the last one where there is no best yet.

    Args:
        given: a file, the folder of a run or of a model, or "last".

    Raises:
        UsageError: "last" without any run.
        CheckpointError: a folder without a model.
    """
    from dino_lightning.weights.reading import find_model  # imports torch

    return find_model(newest_run() if given == LAST else given)


def refuse_exported(file: Path, reason: str) -> None:
    """Say that a command takes no file that `export` wrote.

    Args:
        file: the file of the model, whatever it is.
        reason: what the command takes instead, as a sentence.

    Raises:
        UsageError: it is such a file.
    """
    from dino_lightning.weights.reading import EXPORTED

    if (kind := EXPORTED.get(file.suffix.lower())) is not None:
        raise UsageError(f"{file} is an exported file ({kind}); {reason}")


def checkpoint_to_resume(given: str | Path, run_dir: Path | None) -> Path:
    """The file to resume a run from: of a run its last checkpoint.

    Args:
        given: a file, the folder of a run, or "last".
        run_dir: the folder of the run where the user has named one; "last" is the last checkpoint in it.

    Raises:
        UsageError: "last" without any run.
    """
    path = (run_dir or newest_run()) if given == LAST else Path(given)
    if not path.is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return folder / "last.ckpt"


def read_whole_checkpoint(path: Path) -> tuple[Path, Any]:
    """A checkpoint and its content; where `last.ckpt` is damaged or missing, the one before it.

    Raises:
        CheckpointError: neither can be read; said here in one sentence, where Lightning would end in a traceback.
    """
    from dino_lightning.weights.reading import read_checkpoint

    try:
        return path, read_checkpoint(path)
    except CheckpointError as error:
        previous = previous_checkpoint(path)
        if path.name != "last.ckpt" or not previous.is_file():
            raise
        content = read_checkpoint(previous)
        say(f"warning: {error} Resuming from the one before it, {previous}.", sys.stderr)
        return previous, content


def raise_if_restoring(error: Exception, args: Sequence[str]) -> None:
    """Say in one sentence that a checkpoint is damaged where an error came while Lightning restored from one.

    Args:
        error: not one of the user's.
        args: of the command, whose last is the checkpoint where there is one.

    Raises:
        CheckpointError: it came from there.
    """
    if isinstance(error, expected_errors()):
        return
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__) if _restores(frame)]
    if names:
        part = names[-1].removeprefix("_").removeprefix("restore_").replace("_", " ")
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"{args[-1]} is damaged, or of another version: its {part} cannot be restored ({reason})."
        ) from error


def _restores(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).endswith(".checkpoint_connector")
