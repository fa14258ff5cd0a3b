"""Train the DINO object detector (DETR with improved denoising anchor boxes) with PyTorch Lightning.

The public names are loaded when they are first used (PEP 562): importing the package itself takes milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_lightning.cli.own_cli import DINOCLI
    from dino_lightning.data import CocoDataModule
    from dino_lightning.detections import Detections
    from dino_lightning.inference.detector import Detector, load_detector
    from dino_lightning.losses import Criterion
    from dino_lightning.metrics import CocoMetric
    from dino_lightning.model import DINO
    from dino_lightning.structures import Batch
    from dino_lightning.training.module import DINOModule

_HOMES = {
    "DINO": "dino_lightning.model",
    "DINOCLI": "dino_lightning.cli.own_cli",
    "Batch": "dino_lightning.structures",
    "CocoDataModule": "dino_lightning.data",
    "CocoMetric": "dino_lightning.metrics",
    "Criterion": "dino_lightning.losses",
    "DINOModule": "dino_lightning.training.module",
    "Detections": "dino_lightning.detections",
    "Detector": "dino_lightning.inference.detector",
    "load_detector": "dino_lightning.inference.detector",
}

__all__ = [
    "DINO",
    "DINOCLI",
    "Batch",
    "CocoDataModule",
    "CocoMetric",
    "Criterion",
    "DINOModule",
    "Detections",
    "Detector",
    "load_detector",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module it is defined in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
