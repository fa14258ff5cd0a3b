"""COCO files in, batches out."""

from typing import TYPE_CHECKING, Any

from dino_lightning.data.annotation_file import load_coco
from dino_lightning.data.augmentation import train_transform
from dino_lightning.data.classes import Classes, check_classes, classes_of
from dino_lightning.data.coco import AnnotationSummary, CocoAnnotations
from dino_lightning.data.dataset import CocoDetection, Sample
from dino_lightning.data.images import read_image
from dino_lightning.data.loading import collate
from dino_lightning.data.split_files import SplitFiles
from dino_lightning.data.splits import find_split_files
from dino_lightning.data.transforms import eval_transform
from dino_lightning.errors import DataError

if TYPE_CHECKING:
    from dino_lightning.data.datamodule import CocoDataModule

__all__ = [
    "AnnotationSummary",
    "Classes",
    "CocoAnnotations",
    "CocoDataModule",
    "CocoDetection",
    "DataError",
    "Sample",
    "SplitFiles",
    "check_classes",
    "classes_of",
    "collate",
    "eval_transform",
    "find_split_files",
    "load_coco",
    "read_image",
    "train_transform",
]


def __getattr__(name: str) -> Any:
    """Load the data module when it is first used: it needs Lightning, which a server of a trained model lacks."""
    if name != "CocoDataModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dino_lightning.data.datamodule import CocoDataModule

    return CocoDataModule
