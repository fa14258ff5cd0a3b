"""A tiny detector with distinct scores, its checkpoint, and images to run it on."""

from __future__ import annotations

from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dino_lightning import DINOModule
from dino_lightning.detections import Detections
from dino_lightning.export.check import drawn
from tests.conftest import TINY_SIZES
from tests.golden_recipe import load_recipe

CLASSES = {"class_names": ["room", "door", "kitchen"], "category_ids": [5, 7, 90]}


def tiny_module(**settings) -> DINOModule:
    sizes = {"image_size": 96, "max_size": 160, **settings}
    module = DINOModule(num_classes=3, backbone_weights=None, **CLASSES, **sizes, **TINY_SIZES)
    load_recipe(module.model, {})  # as if trained: scores are spread, not all the same
    module.score_threshold = 0.2
    return module.eval()


def save(module: DINOModule, path: Path) -> Path:
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "score_threshold": module.score_threshold,
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.5.0",
    }
    torch.save(content, path)
    return path


def images(sizes: list[tuple[int, int]]) -> list[Tensor]:
    return [drawn(height, width, seed=index) for index, (height, width) in enumerate(sizes)]


def assert_same(actual: Detections, expected: Detections, boxes: float = 0.5, scores: float = 1e-3) -> None:
    """One to one, by label and distance; the order of detections of nearly the same score says nothing."""
    assert len(actual) == len(expected) > 0
    apart = (actual.boxes_xyxy[:, None] - expected.boxes_xyxy[None]).abs().amax(-1)
    cost = apart / boxes + (actual.scores[:, None] - expected.scores[None]).abs() / scores
    cost[actual.labels[:, None] != expected.labels[None]] = 1e6
    rows, columns = linear_sum_assignment(cost.numpy())
    assert torch.equal(actual.labels[rows], expected.labels[columns])
    assert float(apart[rows, columns].max()) <= boxes
    assert float((actual.scores[rows] - expected.scores[columns]).abs().max()) <= scores
