"""COCO's average precision of many images: `python -m benchmarks eval`.

`CocoMetric` (average precision, also per class, and best F1) against pycocotools (average precision alone), from the
same detections in memory to the metrics. Both must agree, or there is no result.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.measure import environment, interleaved, save, table
from dino_lightning.detections import Detections
from dino_lightning.metrics import CocoMetric
from dino_lightning.structures import GroundTruth

BOXES = 7  # of an image, on average, as in COCO


def example(images: int, found: int, classes: int) -> tuple[list[GroundTruth], list[Detections]]:
    """Random boxes, most of them found with some error, among many wrong ones."""
    draws = np.random.default_rng(0)
    truths, detections = [], []
    for _ in range(images):
        count = int(draws.poisson(BOXES))
        corner, extent = draws.uniform(0, 500, (count, 2)), draws.uniform(8, 200, (count, 2))
        boxes, labels = np.concatenate((corner, corner + extent), axis=1), draws.integers(classes, size=count)
        truths.append(GroundTruth(boxes, labels, np.zeros(count, dtype=np.bool_), extent.prod(axis=1)))
        wrong = max(0, found - count)
        start, size = draws.uniform(0, 500, (wrong, 2)), draws.uniform(8, 200, (wrong, 2))
        all_boxes = np.concatenate(
            (boxes + draws.normal(0, 4, boxes.shape), np.concatenate((start, start + size), axis=1))
        )
        all_labels = np.concatenate((labels, draws.integers(classes, size=wrong)))[:found]
        scores = np.concatenate((draws.uniform(0.2, 1, count), draws.uniform(0, 0.4, wrong)))[:found]
        order = np.argsort(-scores, kind="stable")
        detections.append(
            Detections(
                boxes_xyxy=torch.from_numpy(all_boxes[:found][order]).float(),
                scores=torch.from_numpy(scores[order]).float(),
                labels=torch.from_numpy(all_labels[order]),
            )
        )
    return truths, detections


def ours(truths: list[GroundTruth], detections: list[Detections]) -> float:
    """AP as CocoMetric computes it."""
    metric = CocoMetric()
    for index, (truth, one) in enumerate(zip(truths, detections, strict=True)):
        metric.update([one], [truth], [index])
    result: dict[str, float] = metric.compute()
    return result["AP"]


def by_pycocotools(truths: list[GroundTruth], detections: list[Detections], classes: int) -> float:
    """AP as pycocotools computes it."""
    annotations: list[dict[str, Any]] = []
    results = []
    for index, (truth, one) in enumerate(zip(truths, detections, strict=True)):
        for (x1, y1, x2, y2), label, area in zip(
            truth.boxes_xyxy.tolist(), truth.labels.tolist(), truth.area.tolist(), strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": 0,
                }
            )
        results += one.to_coco(index)
    truth_file = COCO()
    truth_file.dataset = {
        "images": [{"id": index} for index in range(len(truths))],
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth_file.createIndex()
        evaluation = COCOeval(truth_file, truth_file.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks eval", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--detections", type=int, default=300)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    truths, detections = example(options.images, options.detections, options.classes)
    one, other = ours(truths, detections), by_pycocotools(truths, detections, options.classes)
    if abs(one - other) > 1e-4:
        raise SystemExit(f"The two do not agree: AP {one:.5f} and {other:.5f}.")
    timings = interleaved(
        {
            "CocoMetric": lambda: ours(truths, detections),
            "pycocotools": lambda: by_pycocotools(truths, detections, options.classes),
        },
        rounds=options.rounds,
    )
    ratio = timings["pycocotools"].median / timings["CocoMetric"].median
    print(f"{options.images} images, {options.detections} detections each, {options.classes} classes, AP {one:.4f}\n")
    rows = [("", "seconds", "spread", "ratio")]
    rows += [
        (name, f"{timing.median:.2f}", f"{timing.spread:.0%}", f"{timings['pycocotools'].median / timing.median:.1f}x")
        for name, timing in timings.items()
    ]
    print(table(rows))
    if options.output is not None:
        numbers = {"ratio": ratio, "AP": one, "seconds": {name: timing.as_json() for name, timing in timings.items()}}
        save(options.output, {"environment": environment(), "results": numbers})


if __name__ == "__main__":
    main()
