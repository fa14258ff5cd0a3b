"""From a checkpoint, a model directory or an exported file to a detector that is ready to use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import torch
from torch import nn

from dino_lightning.console import say
from dino_lightning.data.images import ImageLike, read_image, to_pixels
from dino_lightning.detections import Detections, check_score_threshold
from dino_lightning.errors import CheckpointError
from dino_lightning.export.exported_model import ExportedModel
from dino_lightning.inference.plain_model import PlainModel
from dino_lightning.inference.tiling import merge, views
from dino_lightning.weights.reading import EXPORTED, find_model, read_checkpoint
from dino_lightning.weights.stored import (
    DEFAULT_THRESHOLD,
    check_checkpoint,
    check_hyperparameters,
    check_settings,
    check_state,
    missing_settings,
)

if TYPE_CHECKING:  # the module needs Lightning, which a server of a trained model lacks
    from dino_lightning.training.module import DINOModule

# What runs a file on each type of device, in the words of onnxruntime and OpenVINO.
_PROVIDERS = {".onnx": {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}, ".xml": {"cpu": "CPU"}}
_Built = TypeVar("_Built", "DINOModule", PlainModel)


class _Model(Protocol):
    """What a `Detector` needs: a `DINOModule`, the plain model of a server, or an exported file."""

    score_threshold: float

    def detect(
        self, images: Sequence[ImageLike], *, threshold: float | None = None, tta_views: int | None = None
    ) -> list[Detections]: ...


class Detector:
    """A trained model, ready to use: `detector("plan.png")`.

    Args:
        model: a `DINOModule`, a `PlainModel` where Lightning is not installed, or an `ExportedModel`.
        class_names: the name of each label.
        category_ids: the original COCO category id of each label.

    Attributes:
        model: as given.
        class_names: as given.
        category_ids: as given.
    """

    def __init__(self, *, model: _Model, class_names: Sequence[str], category_ids: Sequence[int]) -> None:
        self.model = model
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)

    def __repr__(self) -> str:
        shown = ", ".join(self.class_names[:5]) + (", ..." if len(self.class_names) > 5 else "")
        return f"Detector({len(self.class_names)} classes: {shown}; score_threshold {self.score_threshold:.3f})"

    @property
    def score_threshold(self) -> float:
        """The lowest score that counts, unless another is given: that of the best F1 in validation."""
        return self.model.score_threshold

    @property
    def module(self) -> DINOModule:
        """The `DINOModule` behind it.

        Raises:
            TypeError: there is none, as the model is an exported file, or Lightning is not installed.
        """
        if isinstance(self.model, PlainModel):
            raise TypeError("A DINOModule needs Lightning: python -m pip install lightning, and load the model again.")
        from dino_lightning.training.module import DINOModule

        if not isinstance(self.model, DINOModule):
            raise TypeError("This detector runs an exported file (ONNX or other); load a checkpoint for a DINOModule.")
        return self.model

    def to(self, device: torch.device | str) -> Detector:
        """The same detector, computing on another device from now on; an exported file stays where it is."""
        if isinstance(self.model, nn.Module):
            self.model.to(device)
        return self

    @overload
    def __call__(self, images: ImageLike, **options: Any) -> Detections: ...

    @overload
    def __call__(self, images: Sequence[ImageLike], **options: Any) -> list[Detections]: ...

    def __call__(self, images: ImageLike | Sequence[ImageLike], **options: Any) -> Detections | list[Detections]:
        """Detect in one image, or in each of a list or tuple of images; options and errors as in `detect`."""
        if isinstance(images, list | tuple):
            return self.detect(images, **options)
        return self.detect([images], **options)[0]  # type: ignore[list-item]  # a Sequence is a list or tuple here

    def show(self, image: ImageLike, **options: Any) -> None:
        """Detect in an image and show the picture; options and errors as in `detect`, see `Detections.show`."""
        self.detect([image], **options)[0].show()

    def detect(
        self,
        images: Sequence[ImageLike],
        *,
        threshold: float | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        whole_image: bool = True,
        **sizes: Any,
    ) -> list[Detections]:
        """Detect objects in images of any kind and size, one at a time.

        Args:
            images: paths, PIL images, (H, W, 3) or (H, W) uint8 arrays, or (3, H, W) tensors, uint8 or floating 0-1.
            threshold: keep detections of at least this score; by default `score_threshold`.
            tile: cut images into tiles of so many pixels, for scans much larger than those of training.
            overlap: share of its side that a tile has in common with the next; objects up to that size are whole in
                one of them.
            whole_image: with tiles, look at the whole image as well, scaled down, for objects larger than a tile.
            **sizes: `image_size`, `max_size` and `tta_views` of `DINOModule.detect`.

        Returns:
            Detections of each image, on the host, boxes in its own pixels and clipped to it, see `Detections.within`.

        Raises:
            ValueError: an image that cannot be read, a threshold that is none, or tiles that cannot be.
        """
        found = []
        if threshold is not None:
            check_score_threshold(threshold)
        for image in images:
            if tile is None:
                detections = self.model.detect([image], threshold=threshold, **sizes)[0]
            else:
                pixels = to_pixels(image)
                size = (int(pixels.shape[1]), int(pixels.shape[2]))
                parts = []
                for window in views(size, tile, overlap, whole=whole_image):
                    x1, y1, x2, y2 = window.xyxy
                    view = pixels[:, y1:y2, x1:x2]
                    parts.append((window, self.model.detect([view], threshold=threshold, **sizes)[0]))
                detections = merge(parts, size)
            if isinstance(image, str | Path):
                read, file = partial(read_image, Path(image)), str(image)
                found.append(replace(detections, file=file, read_pixels=read))
            else:
                found.append(replace(detections, read_pixels=partial(to_pixels, image)))
        return found


def load_detector(
    path: str | Path,
    device: torch.device | str = "auto",
    *,
    provider: str | None = None,
    precision: str = "float32",
) -> Detector:
    """The detector of one of our checkpoints, in evaluation mode, with its classes, sizes and score threshold.

    Args:
        path: a checkpoint of a run; a model directory, as a SageMaker job leaves it; the folder of a run; a file that
            `export` wrote (.onnx, .xml, .pt2), or a folder with one; `rooms_small`; or an address, such as
            `hf://OWNER/REPO` for the model.ckpt of a repository.
        device: where to compute: `auto` is a CUDA GPU if there is one, and else the CPU; an Apple GPU is `mps`. For
            an ONNX file `cpu` and `cuda` choose onnxruntime's provider, for a .xml file the device of OpenVINO.
        provider: what an ONNX file is run by in onnxruntime, such as `CUDAExecutionProvider`, or a .xml file on by
            OpenVINO, such as `GPU` or `AUTO`; by `device` if it is not given.
        precision: what OpenVINO computes in, `float32`, or `bfloat16` or `float16` where it has them.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours; or what runs it is missing.
        ValueError: a `provider` or `precision` for a file that has no use for it, or unknown.
    """
    file = find_model(path)
    suffix = file.suffix.lower()
    if provider is not None and suffix not in (".onnx", ".xml"):
        raise ValueError(f"{file}: provider is for .onnx and .xml files; choose by device.")
    if precision != "float32" and suffix != ".xml":
        raise ValueError(f"{file}: precision is for .xml files, which OpenVINO runs.")
    if suffix in EXPORTED:
        model = load_exported(file, device, provider, precision)
        return Detector(model=model, class_names=model.class_names, category_ids=model.category_ids)
    module = (load_plain_model if find_spec("lightning") is None else load_module)(file).to(_best(device))
    count = module.hparams["num_classes"]
    return Detector(
        model=module,
        class_names=module.hparams["class_names"] or [str(label) for label in range(count)],
        category_ids=module.hparams["category_ids"] or range(count),
    )


def load_exported(
    file: Path, device: torch.device | str = "auto", provider: str | None = None, precision: str = "float32"
) -> ExportedModel:
    """The model in a file that `export` wrote, by its suffix, one of `EXPORTED`; arguments as in `load_detector`.

    Raises:
        CheckpointError: as there.
        ValueError: as there, or a device that the file cannot be run on.
    """
    wanted, suffix = torch.device("cpu" if device == "auto" else device), file.suffix.lower()
    if suffix == ".pt2":
        from dino_lightning.export.torch_model import TorchModel

        return TorchModel(file, device=_best(device))
    names = _PROVIDERS[suffix]
    if provider is None and device != "auto":
        if wanted.type not in names:
            raise ValueError(f"{file}: device is {wanted.type!r}; choose {' or '.join(names)}, or give a provider.")
        provider = names[wanted.type]
    if suffix == ".onnx":
        from dino_lightning.export.onnx_model import OnnxModel  # needs packages that not everybody has

        if provider is None:
            return OnnxModel(file)
        of_index = provider == names["cuda"] and wanted.index is not None
        return OnnxModel(file, providers=[(provider, {"device_id": wanted.index}) if of_index else provider])
    from dino_lightning.export.openvino_model import OpenVinoModel

    return OpenVinoModel(file, provider=provider or "CPU", precision=precision)


def _best(device: torch.device | str) -> torch.device | str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_module(path: str | Path) -> DINOModule:
    """The `DINOModule` of one of our checkpoints, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, of a newer version, or not one of ours.
    """
    from dino_lightning.training.module import DINOModule

    content = check_checkpoint(read_checkpoint(path), path)
    check_hyperparameters(content, path, DINOModule)
    module = _built(DINOModule, content, path)
    if lacking := missing_settings(content, DINOModule):
        names = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        say(f"warning: {path} lacks the hyperparameters {names}; their defaults are used.", sys.stderr)
    module.has_weights = True
    return module


def load_plain_model(path: str | Path) -> PlainModel:
    """The model of one of our checkpoints without Lightning, in evaluation mode; it detects what `load_module`'s does.

    Raises:
        CheckpointError: the file is missing, damaged, of a newer version, or not one of ours.
    """
    content = check_checkpoint(read_checkpoint(path), path)
    check_settings(content["hyper_parameters"], path)  # those of training alone are not looked at
    return _built(PlainModel, content, path)


def _built(kind: type[_Built], content: dict[str, Any], path: str | Path) -> _Built:
    """A model of a kind, with the weights and the threshold of a checked checkpoint, in evaluation mode."""
    settings = content["hyper_parameters"]
    try:
        with torch.device("meta"):  # sizes only: wrong ones may need any amount of memory
            check_state(content["state_dict"], kind(**settings).state_dict(), path)
        module = kind(**settings)
    except CheckpointError:
        raise
    except Exception as error:  # sizes that do not go together fail anywhere
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: its hyperparameters make no model ({reason}).") from error
    if "score_threshold" not in content:
        say(f"warning: {path} has no score_threshold; {DEFAULT_THRESHOLD} is used.", sys.stderr)
    module.load_state_dict(content["state_dict"])
    module.score_threshold = float(content.get("score_threshold", DEFAULT_THRESHOLD))
    return module.eval()
