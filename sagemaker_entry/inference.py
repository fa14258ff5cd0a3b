"""Requests to a trained model and their answers: for our server, see `serve`, and for AWS's inference toolkit.

Request: an image (image/jpeg, image/png, application/x-image), or JSON {"images": [base64, ...], "threshold": 0.5}, and
with "tta_views" (1, 2, 4 or 8) for another number of ways to see each image than the model's.
Response: JSON, for each image its size and its detections with name, original category id, score and bbox (x, y, width,
height in pixels). A request that cannot be answered gets status 400 (413 too large, 415 and 406 a type that is not
supported) and {"error": "one sentence"}. The limits are environment variables of the container, see `Limits`.

It is shipped in `code/` of the model directory, where `code/inference.py` gives its four functions to the toolkit.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_lightning import Detections, Detector, load_detector
from dino_lightning.data.image_files import open_image
from dino_lightning.data.images import decode_image
from dino_lightning.errors import DataError
from dino_lightning.training.option_checks import TTA_VIEWS

JSON = "application/json"
IMAGES = ("image/jpeg", "image/png", "image/webp", "image/tiff", "application/x-image", "application/octet-stream")
# Pillow knows more, some of them (EPS) by starting other programs.
FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")
KEYS = ("images", "threshold", "tta_views")
LIMIT_PREFIX = "DINO_LIGHTNING_"
OK, BAD_REQUEST, NOT_ACCEPTABLE, TOO_LARGE, UNSUPPORTED_TYPE = 200, 400, 406, 413, 415
ONNX_FILE = "model.onnx"  # of `python -m dino_lightning export`, put beside the checkpoint
log = logging.getLogger("serve")  # the server's
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for; each is read from the environment, as `DINO_LIGHTNING_MAX_PIXELS=...`.

    Attributes:
        max_bytes: of a request as it arrives; by default 25 MiB, the most that a real-time endpoint lets through.
        max_images: in a request.
        max_pixels: of all images of a request together, known from their headers before one is decoded; by default an
            A0 sheet at 200 dpi. Decoding takes up to 22 bytes of memory for each.
        max_json_depth: how deep lists and objects of JSON may be nested.
        max_waiting: requests that wait for the model or are computed, each with its bytes in memory; our server's.
    """

    max_bytes: int = 25 * 1024 * 1024
    max_images: int = 16
    max_pixels: int = 64_000_000
    max_json_depth: int = 8
    max_waiting: int = 16

    @classmethod
    def from_environment(cls) -> Limits:
        """Those that the environment gives, otherwise the defaults.

        Raises:
            ValueError: a variable is no whole number of at least 1.
        """
        given = {}
        for field in fields(cls):
            name = LIMIT_PREFIX + field.name.upper()
            text = os.environ.get(name)
            if text is None:
                continue
            if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
                raise ValueError(f"The environment variable {name} is {text!r}; it must be a whole number from 1 on.")
            given[field.name] = int(text)
        return cls(**given)


@cache
def limits() -> Limits:
    """The limits of this process, read once."""
    return Limits.from_environment()


class RequestError(ValueError):
    """A request that cannot be answered: one sentence for the client, and the HTTP status that goes with it."""

    def __init__(self, message: str, status: int = BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """Decoded images, each (3, H, W) uint8, the score threshold and the ways to see an image; None for the model's."""

    images: list[Tensor]
    threshold: float | None = None
    tta_views: int | None = None


def model_fn(model_dir: str) -> Detector:
    """Load the model, on the GPU where there is one; on a CPU, `model.onnx` if it lies in the folder.

    Raises:
        ValueError: a limit in the environment is no number, so that the endpoint does not start.
    """
    limits()
    exported = Path(model_dir) / ONNX_FILE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if exported.is_file() and device == "cpu":
        if find_spec("onnxruntime") is not None:
            log.info("ONNX Runtime computes, with %s, on the CPU", ONNX_FILE)
            return load_detector(exported)
        log.warning("%s is there, but onnxruntime is not installed", ONNX_FILE)
    log.info("PyTorch computes, with model.ckpt, on the %s", "GPU" if device == "cuda" else "CPU")
    return load_detector(Path(model_dir) / "model.ckpt", device)


def input_fn(body: bytes | bytearray | str, content_type: str) -> Request | RequestError:
    """Decode a request.

    What is wrong with it is returned, not raised, and passed on to `output_fn`: the toolkit answers an exception of its
    own with a traceback, and any other with status 500.
    """
    try:
        return parse_request(body, content_type)
    except RequestError as error:
        return error


def parse_request(body: bytes | bytearray | str, content_type: str) -> Request:
    """Decode a request.

    Raises:
        RequestError: unknown content type, bad JSON, an image that cannot be decoded, or more than `limits` allow.
    """
    check_size(len(body))
    kind = check_type(content_type)
    if kind in IMAGES:
        return Request(_decoded([body.encode() if isinstance(body, str) else bytes(body)], ["The image"]))
    content = _parsed(body)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise RequestError('JSON must look like {"images": ["<base64>", ...], "threshold": 0.5}.')
    if unknown := sorted(set(content) - set(KEYS)):
        raise RequestError(
            f"There is no key {unknown[0][:50]!r} in a request; there are {', '.join(KEYS[:-1])} and {KEYS[-1]}."
        )
    threshold = content.get("threshold")
    if threshold is not None and not (type(threshold) in (int, float) and 0 <= threshold <= 1):
        raise RequestError(f"threshold is {repr(threshold)[:50]}; it must be a number from 0 to 1.")
    views = content.get("tta_views")
    if views is not None and (type(views) is not int or views not in TTA_VIEWS):
        raise RequestError(f"tta_views is {repr(views)[:50]}; it must be 1, 2, 4 or 8.")
    encoded = content["images"]
    if len(encoded) > limits().max_images:
        raise too_large(f"The request has {len(encoded):,} images", "max_images")
    names = [f"Image {position}" for position in range(len(encoded))]
    return Request(_decoded([_bytes(*each) for each in zip(encoded, names, strict=True)], names), threshold, views)


def check_size(count: int) -> None:
    """Check the number of bytes of a request.

    Raises:
        RequestError: there are more than `limits` allow.
    """
    if count > limits().max_bytes:
        raise too_large(f"The request has at least {count:,} bytes", "max_bytes")


def check_type(content_type: str | None) -> str:
    """The content type of a request, without parameters.

    Raises:
        RequestError: it is none of those that are read.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind not in (JSON, *IMAGES):
        raise RequestError(
            f"Content type {(content_type or '')[:100]!r} is not supported; send {JSON} or one of {', '.join(IMAGES)}.",
            UNSUPPORTED_TYPE,
        )
    return kind


def predict_fn(request: Request | RequestError, model: Detector) -> list[dict[str, Any]] | RequestError:
    """Run the detector; returns for each image its width, height and detections."""
    if isinstance(request, RequestError):
        return request
    found = model.detect(request.images, threshold=request.threshold, tta_views=request.tta_views)
    return [_described(image, detections) for image, detections in zip(request.images, found, strict=True)]


def output_fn(predictions: list[dict[str, Any]] | RequestError, accept: str, context: Any = None) -> tuple[str, str]:
    """Encode the response as JSON, the only format supported.

    Args:
        predictions: of `predict_fn`, or what was wrong with the request.
        accept: the content types that the client wants.
        context: that of the model server, which takes the HTTP status.

    Returns:
        The response and its content type.
    """
    status, answer = encoded(predictions, accept)
    if status == OK:
        return answer, JSON
    if context is None:  # a server that gives none: the status travels in an exception, and a traceback with it
        raise _exception(status, answer)
    context.set_response_status(status, "Bad Request")
    return answer, JSON


def encoded(predictions: list[dict[str, Any]] | RequestError, accept: str | None) -> tuple[int, str]:
    """The HTTP status and the JSON of the answer to a request.

    Args:
        predictions: of `predict_fn`, or what was wrong with the request.
        accept: the content types that the client wants.
    """
    error = predictions if isinstance(predictions, RequestError) else None
    if error is None and not any(kind in (accept or "*/*") for kind in (JSON, "*/*", "application/*")):
        error = RequestError(
            f"The response is {JSON}, not {(accept or '')[:100]!r}; change the Accept header.", NOT_ACCEPTABLE
        )
    if error is None:
        return OK, json.dumps({"predictions": predictions})
    return error.status, json.dumps({"error": str(error)})


def _exception(status: int, answer: str) -> Exception:
    """What the toolkit turns into an answer with a status; without the toolkit, an error of ours."""
    try:
        from sagemaker_inference.errors import GenericInferenceToolkitError
    except ImportError:
        return RequestError(answer, status)
    toolkits: Exception = GenericInferenceToolkitError(status, answer, "Bad Request")
    return toolkits


def too_large(what: str, limit: str) -> RequestError:
    """The error of a request that exceeds a limit, which it names with its environment variable."""
    most = getattr(limits(), limit)
    return RequestError(f"{what}; the limit, {LIMIT_PREFIX}{limit.upper()}, is {most:,}.", TOO_LARGE)


def _parsed(body: bytes | bytearray | str) -> Any:
    """JSON text as Python objects."""
    try:
        text = body if isinstance(body, str) else body.decode()
        _check_depth(text)
        return json.loads(text, parse_constant=_no_number)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request is not valid JSON ({error}).") from error


def _check_depth(text: str) -> None:
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        character = text[found.start()]
        depth += (character in "[{") - (character in "]}")
        if depth > limits().max_json_depth:
            raise too_large(f"The lists and objects of the JSON are nested {depth} deep or more", "max_json_depth")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _bytes(encoded: Any, name: str) -> bytes:
    """The content of a base64-encoded file."""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise RequestError(f"{name} is not a base64-encoded image ({error}).") from error


def _decoded(contents: Sequence[bytes], names: Sequence[str]) -> list[Tensor]:
    """Image files as tensors, after a look at all their headers."""
    pixels = 0
    for content, name in zip(contents, names, strict=True):
        image_format, count = _header(content, name)
        if image_format not in FORMATS:
            raise RequestError(f"{name} is a file of type {image_format}; send one of {', '.join(FORMATS)}.")
        pixels += count
        if pixels > limits().max_pixels:
            what = f"{name} has" if pixels == count else f"{names[0]} to {name.lower()} have"
            raise too_large(f"{what} {pixels:,} pixels", "max_pixels")
    try:
        return [decode_image(io.BytesIO(content), name) for content, name in zip(contents, names, strict=True)]
    except DataError as error:
        raise RequestError(str(error)) from error


def _header(content: bytes, name: str) -> tuple[str | None, int]:
    """The format of an image file and how many pixels it says to have."""
    try:
        with open_image(io.BytesIO(content)) as image:
            return image.format, image.width * image.height
    except MemoryError:
        raise
    except Exception as error:  # as many kinds as there are decoders
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise RequestError(f"{name} is not an image that can be read{reason}.") from error


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
