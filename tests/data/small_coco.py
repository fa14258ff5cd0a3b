"""Small COCO datasets, written to disk for one test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 1, "name": "kitchen"}, {"id": 2, "name": "bath"}]


def annotation(annotation_id: int, image_id: int, category_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def document(count: int = 3, first_id: int = 1) -> dict[str, Any]:
    """Images of 40 x 30 (width x height), 50 x 30, 60 x 30 ..., each with one box of either class."""
    images, annotations = [], []
    for image_id in range(first_id, first_id + count):
        width, height = 30 + 10 * (image_id - first_id + 1), 30
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height})
        annotations.append(annotation(2 * image_id, image_id, 1, [4, 5, 20, 10]))
        annotations.append(annotation(2 * image_id + 1, image_id, 2, [10, 15, 6, 12]))
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_images(folder: Path, content: dict[str, Any]) -> None:
    """Each image as noise that differs from all others."""
    for entry in content["images"]:
        path = folder / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(entry["id"]).integers(0, 256, (entry["height"], entry["width"], 3))
        Image.fromarray(noise.astype(np.uint8)).save(path)


def write_split(annotations: Path, images: Path, count: int = 3, first_id: int = 1) -> dict[str, Any]:
    content = document(count, first_id)
    write_json(annotations, content)
    write_images(images, content)
    return content


def put(path: str, value: Any) -> Callable[[Any], None]:
    """Set `images.0.id`-like paths, or delete where the value is the ellipsis."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]

    def change(document: Any) -> None:
        entry = document
        for parent in parents:
            entry = entry[parent]
        if value is ...:
            del entry[last]
        else:
            entry[last] = value

    return change
