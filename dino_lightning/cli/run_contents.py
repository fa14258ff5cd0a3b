"""What lies in the folder of a run or an evaluation, and whose it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG = "config.yaml"
CONFIG_HEADER = "# lightning.pytorch=="  # how Lightning's parser begins the file
EVALUATIONS = ("validate", "test")
ONLY_IN_EVALUATION = "verbose"  # a key that the configuration of a training does not have
# What a run writes, as patterns below its folder; each evaluation has a folder of the same kind within it.
OF_A_RUN = (
    CONFIG, "run.json", "metrics.csv", "hparams.yaml", "learning_curves.png", "detections.png",
    *(f"tmp-*.{suffix}-????????.{suffix}" for suffix in ("yaml", "json", "csv", "png")),  # of `atomic_write`
    "tensorboard/events.out.tfevents.*", "tensorboard/hparams.yaml",
    "report/index.html", "report/report.json", "report/per_class.csv", "report/per_image.csv",
    "checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/previous.ckpt", "checkpoints/metrics.csv",
    "checkpoints/tmp-*.ckpt-????????.ckpt", "checkpoints/tmp-*.csv-????????.csv", "non_finite/*",
)  # fmt: skip
# What makes an evaluation the same as another: its results may replace the other's.
EVALUATED = ("root", "val_annotations", "val_images", "test_annotations", "test_images", "val_fraction", "seed")


def config_text(folder: Path) -> str | None:
    """The configuration of what ran in a folder; None if there is none, empty if it cannot be read."""
    try:
        return (folder / CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""


def is_ours(folder: Path, config: str | None) -> bool:
    """Whether a run wrote what lies in a folder: its configuration says so, or else its record."""
    return _is_record(folder / "run.json") if config is None else config.startswith(CONFIG_HEADER)


def _is_record(path: Path) -> bool:
    try:
        return "starts" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def results_in(folder: Path) -> list[Path]:
    """What would be lost: checkpoints; metrics alone only of a run that was to save none, which has no run.json."""
    saved = [path for path in sorted(folder.glob("checkpoints/*.ckpt")) if not path.name.startswith("tmp")]
    metrics = folder / "metrics.csv"
    if metrics.is_file() and metrics.stat().st_size and not (folder / "run.json").is_file():
        saved.append(metrics)
    return saved + [path for part in evaluations_in(folder) for path in part.glob("report/report.json")]


def evaluations_in(folder: Path) -> list[Path]:
    """The folders of evaluations in that of a run."""
    return [part for name in EVALUATIONS for part in (*folder.glob(name), *folder.glob(f"{name}-[0-9]*"))]


def left_by_a_run(folder: Path) -> list[Path]:
    """The files of a folder that have the names of a run's."""
    return [path for pattern in OF_A_RUN for path in sorted(folder.glob(pattern)) if path.is_file()]


def evaluated(config: str | None) -> dict[str, Any] | None:
    """What the results beside a configuration are of; None if there are none."""
    try:
        return identity(stored_options(config) or {})
    except (AttributeError, KeyError, TypeError):
        return None


def stored_options(config: str | None) -> dict[str, Any] | None:
    """What a configuration says; None for none, or one that is damaged."""
    try:
        stored = yaml.safe_load(config or "")
    except (ValueError, yaml.YAMLError):
        return None
    return stored if isinstance(stored, dict) else None


def identity(options: Mapping[str, Any]) -> dict[str, Any]:
    """Checkpoint (or weights) and data of an evaluation."""
    checkpoint = options.get("ckpt_path")
    data = {name: options["data"].get(name) for name in EVALUATED}
    weights = None if checkpoint else options["model"].get("weights")
    return {
        **data,
        "root": os.path.realpath(data["root"]),
        "checkpoint": os.path.realpath(checkpoint) if checkpoint else None,
        "weights": weights,
    }
