"""An exported ONNX file, run by onnxruntime: detections as from the checkpoint it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_lightning.data.images import ImageLike, to_pixels
from dino_lightning.data.sizes import Canvas
from dino_lightning.data.transforms import LabelledImage, Transform, eval_transform
from dino_lightning.detections import Detections, check_score_threshold
from dino_lightning.errors import CheckpointError

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # best first


class OnnxModel:
    """A detector in an ONNX file that `python -m dino_lightning export` wrote.

    Args:
        path: the file.
        providers: what onnxruntime computes with, best first; by default CUDA where it has it, else the CPU.

    Attributes:
        path: the file.
        class_names: the name of each label.
        category_ids: the original COCO category id of each label.
        score_threshold: the lowest score that counts, unless another is given.
        image_size: short side in pixels that images are resized to.
        max_size: limit of the long side.
        stretch_to: side of the square that images are stretched to instead, or None.
        preprocessing: "inside" the file, or "outside", see `export`.

    Raises:
        CheckpointError: no such file, not an ONNX file, or one that `export` did not write; or onnxruntime is missing.
    """

    def __init__(self, path: str | Path, *, providers: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self._session = onnxruntime_session(path, providers)
        stored = self._session.get_modelmeta().custom_metadata_map
        try:
            self.class_names = tuple(json.loads(stored["class_names"]))
            self.category_ids = tuple(json.loads(stored["category_ids"]))
            self.score_threshold = check_score_threshold(float(stored["score_threshold"]))
            self.image_size, self.max_size = int(stored["image_size"]), int(stored["max_size"])
            self.stretch_to: int | None = json.loads(stored["stretch_to"])
            self.preprocessing = stored["preprocessing"]
            mean, std = (torch.tensor(json.loads(stored[name])) for name in ("mean", "std"))
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} was not written by `python -m dino_lightning export`: its metadata lacks the classes, the "
                "threshold or the sizes of images."
            ) from error
        self._mean, self._std = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)

    def detect(
        self,
        images: Sequence[ImageLike],
        *,
        threshold: float | None = None,
        image_size: int | None = None,
        max_size: int | None = None,
    ) -> list[Detections]:
        """Detect objects in images of any kind and size, one at a time; as `DINOModule.detect`.

        Args:
            images: paths, PIL images, (H, W, 3) or (H, W) uint8 arrays, or (3, H, W) tensors, uint8 or floating 0-1.
            threshold: keep detections of at least this score; by default `score_threshold`.
            image_size: short side in pixels to resize to, with preprocessing outside.
            max_size: limit of the long side in pixels, with preprocessing outside.

        Returns:
            Detections of each image, boxes in its own pixels and clipped to it, see `Detections.within`.

        Raises:
            ValueError: an image that cannot be read, or sizes for a file that resizes by itself.
        """
        if self.preprocessing == "inside" and (image_size or max_size):
            raise ValueError("The sizes of images are fixed in this ONNX file; export with --preprocessing outside.")
        threshold = check_score_threshold(self.score_threshold if threshold is None else threshold)
        transform = self._transform(image_size, max_size)
        return [self._detect(to_pixels(image), transform).above(threshold) for image in images]

    def _transform(self, image_size: int | None, max_size: int | None) -> Transform:
        stretch = self.stretch_to if image_size is None and max_size is None else None
        return eval_transform(
            image_size or self.image_size,
            max_size or self.max_size,
            None if stretch is None else Canvas(stretch, "stretch"),
        )

    def _detect(self, pixels: Tensor, transform: Transform) -> Detections:
        inputs: dict[str, Any] = {"images": np.ascontiguousarray(pixels[None].numpy())}
        if self.preprocessing == "outside":
            unlabelled = LabelledImage(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
            resized = transform(unlabelled).image[None]
            inputs = {
                "images": ((resized.float() - self._mean) / self._std).contiguous().numpy(),
                "image_sizes": np.array([resized.shape[2:]], dtype=np.int64),
                "original_sizes": np.array([pixels.shape[1:]], dtype=np.int64),
            }
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        boxes, scores, labels = self._session.run(["boxes", "scores", "labels"], inputs)
        kept = scores[0] > 0  # 0: taken out by non-maximum suppression
        return Detections(
            boxes_xyxy=torch.from_numpy(boxes[0][kept]),
            scores=torch.from_numpy(scores[0][kept]),
            labels=torch.from_numpy(labels[0][kept]),
            class_names=self.class_names,
            category_ids=self.category_ids,
        ).within(size)


def onnxruntime_session(file: str | Path | bytes, providers: Sequence[str] | None = None) -> Any:
    """The session of an ONNX file, given by its path or its content.

    Raises:
        CheckpointError: onnxruntime is missing, there is no such file, or it is none that onnxruntime can load.
    """
    name = "An ONNX file" if isinstance(file, bytes) else str(file)
    try:
        import onnxruntime
    except ImportError as error:
        raise CheckpointError(f'{name}: running it needs onnxruntime: pip install "dino-lightning[export]".') from error
    if not isinstance(file, bytes) and not Path(file).is_file():
        raise CheckpointError(f"{file} does not exist.")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    settings.intra_op_num_threads = torch.get_num_threads()
    there = onnxruntime.get_available_providers()
    wanted = list(providers) if providers is not None else [provider for provider in PROVIDERS if provider in there]
    content = file if isinstance(file, bytes) else str(file)
    try:
        return onnxruntime.InferenceSession(content, settings, providers=wanted)
    except Exception as error:  # onnxruntime has an exception for each of its error codes, without a common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{name} cannot be run by onnxruntime ({reason}).") from error
