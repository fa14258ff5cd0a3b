"""Train the DINO object detector (DETR with improved denoising anchor boxes) with PyTorch Lightning."""

from dino_lightning.data import CocoDataModule
from dino_lightning.detector import Detector, load_detector
from dino_lightning.losses import Criterion
from dino_lightning.metrics import CocoMetric
from dino_lightning.model import DINO
from dino_lightning.module import DINOModule
from dino_lightning.structures import Batch, Detections

__all__ = [
    "DINO",
    "Batch",
    "CocoDataModule",
    "CocoMetric",
    "Criterion",
    "DINOModule",
    "Detections",
    "Detector",
    "load_detector",
]
