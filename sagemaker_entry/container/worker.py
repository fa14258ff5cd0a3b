"""One training process, started by torchrun for each GPU of each host: `fit` with the options of this container."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import lightning
import torch

from dino_lightning.callbacks import StoppedOnRequest
from dino_lightning.cli.command import expected_errors, explain
from dino_lightning.cli.running import execute
from sagemaker_entry.container.callbacks import ProgressLines, SameStart
from sagemaker_entry.container.failure import Failure, write_record
from sagemaker_entry.container.trial import MeasureTrial
from sagemaker_entry.container.worker_settings import LAST, WorkerSettings
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.progress import PREFIX


def fit_arguments(settings: WorkerSettings) -> list[str]:
    """The options of `fit` for this container; a later option wins, so those that the container sets come last."""
    arguments = ["--config", settings.config] if settings.config else []
    arguments += settings.arguments
    on_gpu = torch.cuda.is_available()
    distributed = settings.processes * settings.hosts > 1
    arguments += [
        f"--run_dir={settings.run_dir}",
        f"--trainer.accelerator={'gpu' if on_gpu else 'cpu'}",
        f"--trainer.devices={settings.processes}",
        f"--trainer.num_nodes={settings.hosts}",
        f"--trainer.strategy={'ddp' if distributed else 'auto'}",
        "--trainer.enable_progress_bar=false",
    ]
    if not on_gpu:
        arguments.append("--trainer.precision=32-true")  # half precision is slower on a CPU
    if settings.resume:
        arguments += ["--ckpt_path", str(Path(settings.run_dir) / LAST)]
    else:
        arguments.append("--overwrite=true")  # what a start that was killed before its first checkpoint has left
    return arguments


def main(settings_file: str) -> int:
    """Train; returns the exit code. An error is written to a file that the launcher reads."""
    settings = WorkerSettings(**json.loads(Path(settings_file).read_text()))
    metrics = Path(settings.run_dir) / "metrics.csv" if settings.resume else None
    start, progress = SameStart(Path(settings.run_dir) / LAST, settings.met), ProgressLines(metrics)
    callbacks: list[lightning.Callback] = [start, progress]
    if settings.trial is not None:
        callbacks.append(MeasureTrial(Path(settings.trial), settings.job, settings.started))
    rank = int(os.environ.get("RANK", 0))
    try:
        execute("fit", fit_arguments(settings), callbacks, stop_flag=settings.flag)
    except StoppedOnRequest as stopped:
        print(f"{PREFIX} {stopped}", flush=True)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            settings.saved.write_text(str(stopped.step))
        return 0  # the launcher sees from the file `saved` that training has not finished
    except BaseException as error:
        if isinstance(error, (*expected_errors(), Problem)):
            message = explain(error)
        else:
            traceback.print_exc()
            message = _one_sentence(error)
        write_record(Failure.of(message, host=settings.host, rank=rank), Path(settings.scratch))
        print(f"error: {message}", file=sys.stderr, flush=True)
        # Exit at once: an orderly shutdown would wait for the other ranks, which wait for this one.
        os._exit(1)
    return 0


def _one_sentence(error: BaseException) -> str:
    """The message of an unexpected error on one line; for CUDA out of memory, with advice."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f"The GPU ran out of memory; lower data.batch_size or data.image_size, or use a larger GPU ({text[:200]})."
        )
    return f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
