"""From what the user gives for a checkpoint (a file, the folder of a run, `last`) to a file, for every command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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
