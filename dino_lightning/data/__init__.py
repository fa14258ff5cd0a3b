"""COCO files in, batches out.

The names are loaded when they are first used (PEP 562): reading annotation files needs no PyTorch, and a server of a
trained model lacks Lightning, which the data module needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_lightning.data.annotation_file import load_coco
    from dino_lightning.data.augmentation import train_transform
    from dino_lightning.data.classes import Classes, check_classes, classes_of
    from dino_lightning.data.coco import AnnotationSummary, CocoAnnotations
    from dino_lightning.data.datamodule import CocoDataModule
    from dino_lightning.data.dataset import CocoDetection, Sample
    from dino_lightning.data.images import read_image
    from dino_lightning.data.loading import collate
    from dino_lightning.data.split_files import SplitFiles
    from dino_lightning.data.splits import find_split_files
    from dino_lightning.data.transforms import eval_transform
    from dino_lightning.errors import DataError

_HOMES = {
    "AnnotationSummary": "data.coco",
    "Classes": "data.classes",
    "CocoAnnotations": "data.coco",
    "CocoDataModule": "data.datamodule",
    "CocoDetection": "data.dataset",
    "DataError": "errors",
    "Sample": "data.dataset",
    "SplitFiles": "data.split_files",
    "check_classes": "data.classes",
    "classes_of": "data.classes",
    "collate": "data.loading",
    "eval_transform": "data.transforms",
    "find_split_files": "data.splits",
    "load_coco": "data.annotation_file",
    "read_image": "data.images",
    "train_transform": "data.augmentation",
}

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
    """Load a name from the module it is defined in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"dino_lightning.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
