"""Records how a run was made: `run.json` and `config.yaml` in its folder."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback

from dino_lightning.callbacks.run_loggers import unwritten
from dino_lightning.console import without_secrets
from dino_lightning.data import CocoDataModule
from dino_lightning.files import atomic_write
from dino_lightning.model import deformable_attention, residual_norm
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.stored import OPTIONS_KEY

PACKAGES = ("dino-lightning", "torch", "torchvision", "lightning", "numpy", "pillow", "faster-coco-eval", "triton")


class RunRecord(lightning.Callback):
    """Writes versions, commit, data, classes and command line to a file; each start of the run adds an entry.

    What computes deformable attention and residual norms, and whether layers are compiled and replayed as CUDA graphs,
    is added after the first batch: a kernel is tried when it is first called, and a compiler can fail then.

    Args:
        path: the JSON file.
    """

    _record: dict[str, Any] | None = None  # of the first process

    def __init__(self, *, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the file, on the first process."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(data, CocoDataModule):
            return
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        start = {
            "time": now,
            "command": shlex.join([Path(sys.argv[0]).name, *without_secrets(sys.argv[1:])]),
            "from_step": trainer.global_step,
            "processes": trainer.world_size,
            "device": _device(trainer.strategy.root_device),
            "precision": str(trainer.precision),
            "python": platform.python_version(),
            "packages": _versions(),
            "git": _commit(Path(__file__).parent),
        }
        self._record = {"starts": [*self._starts(), start], "classes": _classes(data), "data": fingerprint(data)}
        self._write()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write which kernels run and whether layers are compiled, again if that has changed; no device is asked."""
        if self._record is None:
            return
        start, device = self._record["starts"][-1], trainer.strategy.root_device
        found = {
            "deformable_attention": deformable_attention.implementation_in_use(device),
            "residual_norm": residual_norm.implementation_in_use(device),
        }
        if isinstance(pl_module, DINOModule):
            found["compiled"] = str(pl_module.compilation)
            found["cuda_graphs"] = pl_module.compilation.of_graphs
        if not found.items() <= start.items():
            start.update(found)
            self._write()

    def _write(self) -> None:
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(self._record, indent=2, allow_nan=False))

    def _starts(self) -> list[Any]:
        """The entries of earlier starts of a resumed run."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return list(json.loads(self.path.read_text())["starts"])
        return []


class SavedConfig(SaveConfigCallback):
    """Writes `config.yaml`, whole or not at all, and its text into every checkpoint, which may be copied elsewhere.

    Without the secrets of addresses. A resumed run keeps its old file until its checkpoint has been accepted.

    Args:
        *given: as in Lightning: parser, options and the name of the file.
        folder: of the run, where the file is put whatever the loggers are.
        **more: as in Lightning.
    """

    _text: str | None = None

    def __init__(self, *given: Any, folder: Path, **more: Any) -> None:
        super().__init__(*given, **more)
        self.folder = folder

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Save at once in evaluation; in training `on_fit_start` does it."""
        if stage != "fit":
            self.config = _storable(self.config)
            self._save(trainer)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save, without the checkpoint: a new run with this configuration must not resume from it."""
        self.config = _storable(self.config)
        if "ckpt_path" in self.config:  # which is an option of commands
            self.config.ckpt_path = None
        self._save(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the options."""
        if self._text is not None:
            checkpoint[OPTIONS_KEY] = self._text

    def _save(self, trainer: lightning.Trainer) -> None:
        # with options that are null; by place, as jsonargparse has renamed the argument
        self._text = str(self.parser.dump(self.config, "parser_mode", False))
        if trainer.is_global_zero and not self.already_saved:
            path = self.folder / self.config_filename
            try:
                with atomic_write(path) as temporary:
                    temporary.write_text(self._text, encoding="utf-8")
            except OSError as error:
                raise unwritten(path, error) from error
        self.already_saved = True
        trainer.strategy.barrier("config")


def fingerprint(data: CocoDataModule) -> dict[str, dict[str, Any]]:
    """For each split: the numbers of images and boxes, and a SHA-256 of annotation file and image file sizes."""
    result = {}
    for name in ("train", "val", "test"):
        split = getattr(data, f"{name}_set")
        if split is None:
            continue
        annotations = split.annotations
        path = Path(annotations.path)  # no file behind a dataset in memory
        digest = hashlib.sha256(path.read_bytes() if path.is_file() else annotations.boxes_xyxy.tobytes())
        for index, image in enumerate(annotations.images):
            path = annotations.image_path(index)
            size = path.stat().st_size if path.is_file() else -1
            digest.update(f"{image.file_name}:{size}\n".encode())
        result[name] = {
            "annotations": str(annotations.path),
            "images": len(split),
            "boxes": int((annotations.usable & ~annotations.iscrowd).sum()),
            "sha256": digest.hexdigest(),
        }
    return result


def _storable(config: Namespace) -> Namespace:
    """A copy of the options without the secrets in their addresses."""
    copy = config.clone()
    for name, value in config.items():
        copy[name] = _storable_value(value)
    return copy


def _storable_value(value: Any) -> Any:
    if isinstance(value, Namespace):
        return _storable(value)
    if isinstance(value, list):
        return [_storable_value(content) for content in value]
    return without_secrets(value)


def _classes(data: CocoDataModule) -> list[dict[str, Any]]:
    return [
        {"label": label, "category_id": category_id, "name": name}
        for label, (category_id, name) in enumerate(zip(data.category_ids, data.class_names, strict=True))
    ]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _commit(folder: Path) -> str | None:
    """The commit of the package, with a + if files differ from it; None outside a checkout."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
