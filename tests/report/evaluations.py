"""Evaluations of made-up detections on real files: perturbed truth, repeats, strays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_lightning.data.annotation_file import load_coco
from dino_lightning.data.classes import classes_of
from dino_lightning.data.coco import ground_truth
from dino_lightning.detections import Detections
from dino_lightning.metrics import CocoMetric
from dino_lightning.report import Source

WIDTH, HEIGHT = 320, 200


def write_images(folder: Path, class_names, *, num_images=8, boxes=6, seed=0, names=None) -> Path:
    """A COCO file with noisy images; the first image is empty, the last class is never used if there are several."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(num_images):
        name = names[number] if names else f"{number:03}.png"
        pixels = rng.integers(120, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": number + 1, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for _ in range(boxes if number else 0):
            size = rng.uniform(10, 100, 2)
            corner = rng.uniform(0, [WIDTH, HEIGHT] - size)
            used = max(1, len(class_names) - 1)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 10 + int(rng.integers(used)),
                    "bbox": [*corner.tolist(), *size.tolist()],
                    "area": float(size.prod()),
                    "iscrowd": int(rng.random() < 0.05),
                }
            )
    categories = [{"id": 10 + label, "name": name} for label, name in enumerate(class_names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def perturbed(truth, num_classes, rng, *, missed=0.15, confused=0.15, spread=0.08, strays=4):
    """Detections of one image, made from its truth."""
    picked = np.flatnonzero((rng.random(len(truth.labels)) >= missed) & ~truth.iscrowd)
    picked = np.concatenate((picked, picked[rng.random(len(picked)) < 0.2]))
    sides = np.tile(truth.boxes_xyxy[picked, 2:] - truth.boxes_xyxy[picked, :2], 2)
    boxes = truth.boxes_xyxy[picked] + rng.normal(0, spread, (len(picked), 4)) * sides
    labels = truth.labels[picked].copy()
    wrong = rng.random(len(labels)) < confused
    labels[wrong] = rng.integers(0, num_classes, wrong.sum())
    corner = rng.uniform(0, 150, (int(rng.integers(strays + 1)), 2))
    boxes = np.concatenate((boxes, np.concatenate((corner, corner + rng.uniform(10, 80, corner.shape)), axis=1)))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels = np.concatenate((labels, rng.integers(0, num_classes, len(corner))))
    scores = np.round(np.concatenate((rng.beta(6, 2, len(picked)), rng.beta(2, 5, len(corner)))), 2)
    return torch.tensor(boxes).float(), torch.tensor(scores).float(), torch.tensor(labels).long()


def evaluate(folder: Path, *, seed=0, stage="validate", **how):
    """The evaluation of made-up detections on a folder of `write_images`, and its source."""
    annotations = load_coco(folder / "annotations.json", folder)
    classes = classes_of(annotations)
    labels = classes.labels_of(annotations)
    rng = np.random.default_rng(seed)
    metric = CocoMetric(class_names=classes.names)
    for index, image in enumerate(annotations.images):
        truth = ground_truth(annotations, labels, index)
        metric.update([Detections(*perturbed(truth, len(classes), rng, **how))], [truth], [image.id])
    metric.compute()
    return metric.evaluated(), Source(stage, annotations, classes.category_ids, "runs/x/checkpoints/best.ckpt")
