"""Part 8: a whole `fit` on drawn plans: the speed of the product, loader and evaluation included, not of the model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from benchmarks.gpu.report import NotHere, Report
from dino_lightning.cli.config_files import config_path


def fit(report: Report) -> None:
    """One training run, measured as `launch --trial` measures a job, in more steps."""
    report.attempt("fit", lambda: run(report))


def run(report: Report) -> dict[str, Any]:
    """Images a second, the share of waiting for data, seconds to the first batch and of an evaluated image, memory.

    Raises:
        NotHere: a package is missing that only the command line needs.
    """
    started = time.monotonic()
    try:
        from dino_lightning.cli.running import execute
        from dino_lightning.floor_plans import write_rooms_dataset
        from sagemaker_entry.container import trial
        from sagemaker_entry.protocol.trial import TRIAL_FILE
    except ModuleNotFoundError as missing:
        raise NotHere(f"it needs the package {missing.name}") from missing
    steps, plans, held_out = (12, 16, 8) if report.small else (150, 100, 16)
    with TemporaryDirectory() as folder:
        root = write_rooms_dataset(Path(folder) / "rooms", num_train=plans, num_val=held_out, style="clean", seed=0)
        drawn, path = time.monotonic(), Path(folder) / TRIAL_FILE
        arguments = [*_options(report), "--data.root", str(root), "--run_dir", str(Path(folder) / "run")]
        with mock.patch.object(trial, "STEPS", steps):
            execute("fit", arguments, callbacks=[trial.MeasureTrial(path, "benchmark", drawn)])
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    per_second = found["batch_size"] / found["seconds_per_batch"]
    whole = {"seconds to draw the plans": drawn - started, "seconds of fit": time.monotonic() - drawn}
    return {**found, "images per second": per_second, "steps": steps, **whole}


def _options(report: Report) -> list[str]:
    """R50 4-scale at 640 pixels from random weights; the demo on a CPU."""
    if report.small:
        return ["--config", str(config_path("rooms_demo.yaml")), "--trainer.max_epochs", "4"]
    return [
        *("--config", str(config_path("room_detection.yaml")), "--model.weights", "null"),
        *("--model.backbone_weights", "null", "--trainer.devices", "1", "--trainer.strategy", "auto"),
        *("--data.image_size", "640", "--data.max_size", "640", "--data.num_workers", "8"),
        *("--trainer.max_epochs", "3"),  # of 50 steps
    ]
