"""Serving a trained model on an endpoint: the four functions that SageMaker's PyTorch containers call.

Request: an image (image/jpeg, image/png, application/x-image), or JSON {"images": [base64, ...], "threshold": 0.5}.
Response: JSON, for each image its size and its detections with name, original category id, score and bbox (x, y, width,
height in pixels). This file is shipped in `code/` of the model directory, beside the package.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_lightning import Detections, Detector, load_detector
from dino_lightning.data.images import decode_image

JSON = "application/json"
IMAGES = ("image/jpeg", "image/png", "image/webp", "image/tiff", "application/x-image", "application/octet-stream")


@dataclass(frozen=True)
class Request:
    """Decoded images, each (3, H, W) uint8, and the score threshold; None for the model's own."""

    images: list[Tensor]
    threshold: float | None = None


def model_fn(model_dir: str) -> Detector:
    """Load the model, on the GPU where there is one."""
    return load_detector(Path(model_dir) / "model.ckpt", "cuda" if torch.cuda.is_available() else "cpu")


def input_fn(body: bytes | bytearray | str, content_type: str) -> Request:
    """Decode a request.

    Raises:
        ValueError: unknown content type, JSON without images, or an image that cannot be decoded.
    """
    kind = content_type.partition(";")[0].strip().lower()
    raw = body.encode() if isinstance(body, str) else bytes(body)
    if kind in IMAGES:
        return Request([_decoded(raw, "the image")])
    if kind != JSON:
        raise ValueError(f"Content type {content_type!r} is not supported; send {JSON} or one of {', '.join(IMAGES)}.")
    content = json.loads(raw)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError('JSON must look like {"images": ["<base64>", ...], "threshold": 0.5}.')
    images = []
    for position, encoded in enumerate(content["images"]):
        try:
            images.append(_decoded(base64.b64decode(encoded, validate=True), f"image {position}"))
        except (binascii.Error, TypeError, ValueError) as error:
            raise ValueError(f"Image {position} is not a base64-encoded image ({error}).") from error
    threshold = content.get("threshold")
    if threshold is not None and not isinstance(threshold, int | float):
        raise ValueError(f"threshold is {threshold!r}; it must be a number from 0 to 1.")
    return Request(images, threshold)


def predict_fn(request: Request, model: Detector) -> list[dict[str, Any]]:
    """Run the detector; returns for each image its width, height and detections."""
    found = model.detect(request.images, threshold=request.threshold)
    return [_described(image, detections) for image, detections in zip(request.images, found, strict=True)]


def output_fn(predictions: list[dict[str, Any]], accept: str) -> str:
    """Encode the response as JSON, the only format supported.

    Raises:
        ValueError: `accept` does not allow JSON.
    """
    if not any(kind in accept for kind in (JSON, "*/*", "application/*")):
        raise ValueError(f"The response is {JSON}, not {accept!r}; change the Accept header.")
    return json.dumps({"predictions": predictions})


def _decoded(raw: bytes, name: str) -> Tensor:
    return decode_image(io.BytesIO(raw), name)


def _described(image: Tensor, detections: Detections) -> dict[str, Any]:
    entries = detections.to_coco(image_id=0)
    return {
        "width": int(image.shape[2]),
        "height": int(image.shape[1]),
        "detections": [
            {"name": name, **{key: value for key, value in entry.items() if key != "image_id"}}
            for name, entry in zip(detections.names, entries, strict=True)
        ],
    }
