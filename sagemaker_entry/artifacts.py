"""The model directory at the end of a job; its content is that of `dino_lightning.exporting.model_directory`."""

from __future__ import annotations

from pathlib import Path

from dino_lightning.exporting.model_directory import write_model_directory
from dino_lightning.exporting.package_code import serving_code
from sagemaker_entry.settings import BEST


def write_model(run_dir: Path, model_dir: Path, *, complete: bool) -> bool:
    """Write the best checkpoint's weights, a description, the run's results and the code to use them.

    Args:
        run_dir: the folder of the run.
        model_dir: what is in it becomes model.tar.gz.
        complete: False if the run was stopped before its end.

    Returns:
        False if there is no best checkpoint yet; then nothing is written.
    """
    best = run_dir / BEST
    if not best.is_file():
        return False
    write_model_directory(best, run_dir, model_dir, serving_code(), complete=complete)
    return True
