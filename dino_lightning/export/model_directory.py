"""A model directory, as a SageMaker job writes it: all that is needed to use the model, without the training state."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dino_lightning.errors import CheckpointError
from dino_lightning.weights.reading import read_checkpoint
from dino_lightning.weights.stored import DEFAULT_THRESHOLD, FORMAT_KEY, VERSION_KEY, check_checkpoint

MODEL_FILE = "model.ckpt"
DESCRIPTION_FILE = "model.json"
CODE_FOLDER = "code"
FORMAT = "dino_lightning model 1"
KEPT_ENTRIES = (
    "state_dict",
    "hyper_parameters",
    "score_threshold",
    "epoch",
    "global_step",
    "pytorch-lightning_version",
)
RESULT_FILES = ("config.yaml", "metrics.csv", "learning_curves.png", "detections.png")


def write_model_directory(
    checkpoint_path: Path, run_dir: Path | None, model_dir: Path, code: Mapping[str, bytes], *, complete: bool
) -> None:
    """Write a checkpoint's weights, a description, the run's results and the code to use them.

    Args:
        checkpoint_path: a checkpoint of a run, or the model file of such a directory.
        run_dir: the folder of the run, None if there is none; results that it does not have are left out.
        model_dir: where to write; other files in it stay.
        code: the files of the folder `code`, by their paths in it.
        complete: False if the run was stopped before its end.

    Raises:
        CheckpointError: not a checkpoint of ours.
    """
    checkpoint = check_checkpoint(read_checkpoint(checkpoint_path), checkpoint_path)
    checkpoint.setdefault("score_threshold", DEFAULT_THRESHOLD)
    results = {} if run_dir is None else {name: run_dir / name for name in RESULT_FILES}
    missing = [name for name in KEPT_ENTRIES if name not in checkpoint]
    if missing:
        raise CheckpointError(f"{checkpoint_path} is not a checkpoint of dino_lightning: it has no {missing[0]}.")
    partial = model_dir / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    kept = (*KEPT_ENTRIES, *(name for name in (FORMAT_KEY, VERSION_KEY) if name in checkpoint))
    try:
        torch.save({name: checkpoint[name] for name in kept}, partial / MODEL_FILE)
        (partial / DESCRIPTION_FILE).write_text(
            json.dumps(describe(checkpoint, results.get("metrics.csv"), complete=complete), indent=2) + "\n"
        )
        for name, path in results.items():
            if path.is_file():
                shutil.copyfile(path, partial / name)
        for name, content in code.items():
            place = partial / CODE_FOLDER / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        for path in partial.iterdir():
            target = model_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_model_directory(folder: Path) -> bool:
    """Whether a folder is one that `write_model_directory` wrote."""
    try:
        description = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(description, dict) and description.get("format") == FORMAT


def describe(checkpoint: Mapping[str, Any], metrics_file: Path | None, *, complete: bool) -> dict[str, Any]:
    """Classes, preprocessing, threshold and metrics of a checkpoint, for people and other programs.

    The metrics are those of the checkpoint's epoch in the run's metrics.csv: the checkpoint itself is written before
    the epoch is over.
    """
    settings = checkpoint["hyper_parameters"]
    ids = settings.get("category_ids") or list(range(settings["num_classes"]))
    names = settings.get("class_names") or [str(label) for label in range(len(ids))]
    metrics: dict[str, float] = {}
    if metrics_file is not None and metrics_file.is_file():
        with metrics_file.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("val/AP") and int(float(row["epoch"])) == checkpoint["epoch"]:
                    metrics = {name: float(value) for name, value in row.items() if name.startswith("val/") and value}
    return {
        "format": FORMAT,
        "weights": MODEL_FILE,
        "complete": complete,
        "epoch": checkpoint["epoch"] + 1,
        "score_threshold": checkpoint["score_threshold"],
        "classes": [
            {"label": label, "category_id": category_id, "name": name}
            for label, (category_id, name) in enumerate(zip(ids, names, strict=True))
        ],
        "preprocessing": {
            "colour": "RGB, 0-255",
            "short_side": settings.get("image_size"),
            "long_side_at_most": settings.get("max_size"),
            "stretched_to_a_square_of": settings.get("stretch_to"),
            "normalisation": "inside the model",
        },
        "tta_views": settings.get("tta_views", 1),
        "metrics": metrics,
    }
