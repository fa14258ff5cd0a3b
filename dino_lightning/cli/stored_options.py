"""The options of a run, from its checkpoint and its `config.yaml`: where the two disagree, the checkpoint's count."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from dino_lightning.cli.options_of_weights import model_options
from dino_lightning.console import say
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import CheckpointError
from dino_lightning.files import unreadable
from dino_lightning.training.resume import ARCHITECTURE, changed_options
from dino_lightning.weights.places import is_library_name
from dino_lightning.weights.reading import read_checkpoint
from dino_lightning.weights.stored import OPTIONS_KEY, check_checkpoint, check_settings
from dino_lightning.weights.zoo import weights_file

SECTIONS = ("data", "model", "trainer")  # of every configuration of ours
CONFIG = "config.yaml"
EVALUATED = ("data.", "model.")  # options that an evaluation takes from the run
AFTER_THE_MODEL = ("max_detections", "nms_iou_threshold", "tta_views")  # what makes detections of its output
MOST_SHOWN = 4  # differing options in a sentence

# arguments that the model takes over from the data
FROM_DATA = ("num_classes", "class_names", "category_ids", "image_size", "max_size", "stretch_to")


def run_folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in: it is in `checkpoints/`, beside a record or our configuration.

    Args:
        checkpoint: its file.
    """
    folder = checkpoint.resolve().parent
    run = folder.parent
    if folder.name != "checkpoints":
        return None
    return run if (run / "run.json").is_file() or _read(run / CONFIG) is not None else None


def stored_arguments(subcommand: str, checkpoint: Path, content: Mapping[str, Any]) -> list[str]:
    """What the run behind a checkpoint was started with, as arguments; says where they do not come from both places.

    The options in the checkpoint are those that it was written with. A `config.yaml` that was changed since, or was
    cut, does not count: what differs is printed, and `--config` takes the file as it is.

    Args:
        subcommand: `fit`, `validate` or `test`.
        checkpoint: its file.
        content: of that file, checked.
    """
    text = content.get(OPTIONS_KEY)
    stored = _parsed(text)
    if text is not None and stored is None:
        say(f"warning: {checkpoint}: the options stored in it are damaged.", sys.stderr)
    run = run_folder_of(checkpoint)
    file = None if run is None else run / CONFIG
    if stored is None:
        if file is not None and file.is_file():
            return ["--config", str(file)]
        return arguments_of_model(content["hyper_parameters"])
    if file is None:
        say(f"Options: those stored in {checkpoint}, which is in no folder of a run.")
    elif (reason := _why_not(subcommand, file, stored)) is not None:
        say(f"warning: {reason}; the options stored in the checkpoint are used.", sys.stderr)
    return ["--config", str(text)]


def _why_not(subcommand: str, file: Path, stored: Mapping[str, Any]) -> str | None:
    """Why the configuration in the run's folder does not say what the checkpoint says; None if it does."""
    if not file.is_file():
        return f"{file} is missing"
    try:
        given = _parsed(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        given = None
    except OSError as error:
        return f"{file} {unreadable(error)}"
    if given is None:
        return f"{file} is damaged"
    changes = changed_options(stored, given, both=True)
    if subcommand != "fit":
        changes = [change for change in changes if change.startswith(EVALUATED)]
    if not changes:
        return None
    listed = "; ".join(changes[:MOST_SHOWN]) + (f"; {len(changes) - MOST_SHOWN} more" * (len(changes) > MOST_SHOWN))
    return f"{file} differs from the checkpoint ({listed}), and counts only as --config {file}"


def arguments_of_model(settings: Mapping[str, Any], *, architecture_only: bool = False) -> list[str]:
    """A model's hyperparameters as arguments: the sizes of its images and of the model, which evaluation needs.

    Args:
        settings: hyperparameters by name.
        architecture_only: leave out what concerns training alone.
    """
    if settings.get("stretch_to") is not None:
        sizes = [f"--data.fixed_size={settings['stretch_to']}", "--data.fixed_size_mode=stretch"]
    else:
        names = ("image_size", "max_size")
        sizes = [f"--data.{name}={settings[name]}" for name in names if settings.get(name) is not None]
    wanted = {
        name: value
        for name, value in settings.items()
        if name not in FROM_DATA and (name in (*ARCHITECTURE, *AFTER_THE_MODEL) or not architecture_only)
    }
    return [*sizes, *model_options(wanted)]


def arguments_of_weights(place: str | None) -> list[str]:
    """The sizes of the model and its images that weights of ours bring with them to an evaluation.

    Args:
        place: what the user gave for weights.

    Raises:
        CheckpointError: they cannot be found or read.
    """
    settings = _settings_of_weights(place)
    return [] if settings is None else arguments_of_model(settings, architecture_only=True)


def _settings_of_weights(place: str | None) -> Mapping[str, Any] | None:
    """The hyperparameters stored with weights; None for those of other programs."""
    if place is None or is_library_name(place):
        return None
    file = weights_file(place)
    content = read_checkpoint(file)
    if not isinstance(content, dict) or "hyper_parameters" not in content:
        return None
    settings: Mapping[str, Any] = check_checkpoint(content, file)["hyper_parameters"]
    check_settings(settings, file)
    return settings


def other_sizes(checkpoint: str | None, weights: str | None, data: CocoDataModule) -> str | None:
    """What is said where images are evaluated at another size than the model was trained at; None where they are not.

    Args:
        checkpoint: the file that is evaluated.
        weights: what the user gave for weights, where there is no checkpoint.
        data: as it was made.
    """
    settings = _settings_of_weights(weights) if checkpoint is None else peek(Path(checkpoint)).get("hyper_parameters")
    if not isinstance(settings, Mapping) or settings.get("image_size") is None:
        return None
    before = _in_words(settings["image_size"], settings.get("max_size"), settings.get("stretch_to"))
    now = _in_words(data.image_size, data.max_size, data.stretch_to)
    return None if before == now else f"Evaluated at {now}; the checkpoint was trained at {before}."


def _in_words(image_size: int, max_size: int | None, stretch_to: int | None) -> str:
    return f"{image_size}/{max_size}" if stretch_to is None else f"{stretch_to}x{stretch_to}, stretched"


def peek(checkpoint: Path) -> Mapping[str, Any]:
    """A checkpoint whose tensors are read only where they are used; empty for a file that is none."""
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # the older format, which cannot be mapped, or no checkpoint: whoever needs it says so
        try:
            content = read_checkpoint(checkpoint)
        except CheckpointError:
            return {}
    return content if isinstance(content, dict) else {}


def options_text(checkpoint: Path) -> str | None:
    """The options that a checkpoint was written with, as YAML; those of its run's folder where it holds none."""
    text = peek(checkpoint).get(OPTIONS_KEY)
    if _parsed(text) is not None:
        return str(text)
    run = run_folder_of(checkpoint)
    if run is None or _read(run / CONFIG) is None:
        return None
    return (run / CONFIG).read_text(encoding="utf-8")


def _read(file: Path) -> Mapping[str, Any] | None:
    try:
        return _parsed(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _parsed(text: Any) -> Mapping[str, Any] | None:
    """A configuration of ours; None if it is something else."""
    try:
        content = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        return None
    whole = isinstance(content, Mapping) and all(isinstance(content.get(name), Mapping) for name in SECTIONS)
    return content if whole else None
