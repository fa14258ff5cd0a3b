"""What a run is told at its end about its errors: cases worked by hand."""

from __future__ import annotations

import pytest
import torch

from dino_lightning.detections import Detections
from dino_lightning.metrics import CocoMetric
from dino_lightning.report import dominating_error
from tests.report.test_errors import BOX, ELSEWHERE, FAR, SHIFTED, image_of


def evaluated(found, objects=(BOX, FAR)):
    """Detections, all of score 0.9, on one image with these objects."""
    metric = CocoMetric(class_names=["room"])
    truth = image_of([], [(box, 0) for box in objects]).truth
    boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
    metric.update([Detections(boxes, torch.full((len(boxes),), 0.9), torch.zeros(len(boxes)).long())], [truth], [1])
    metric.compute()
    return metric.evaluated()


@pytest.mark.parametrize(
    ("found", "listed", "advised"),
    [
        ([BOX, BOX, BOX, FAR], "2 duplicate", "--model.nms_iou_threshold 0.7"),
        ([BOX, FAR, ELSEWHERE, ELSEWHERE], "2 background", "add images without objects"),
        ([], "2 missed", "2 of them not detected; try this: train at a larger size, such as --data.image_size 1056,"),
        ([SHIFTED, FAR], "1 missed, 1 localization", "train longer"),
    ],
)
def test_errors_are_counted_and_one_thing_to_try_is_named(found, listed, advised):
    first, second = dominating_error(evaluated(found), threshold=0.5).split("\n")
    assert first == f"errors at a score of 0.500, of 2 boxes in 1 images: {listed}."
    assert second.startswith("Most are ") and advised in second


def test_one_error_is_no_reason_to_change_anything():
    said = dominating_error(evaluated([BOX, BOX, FAR]), threshold=0.5)
    assert said == "errors at a score of 0.500, of 2 boxes in 1 images: 1 duplicate."


def test_suppression_that_is_there_is_not_advised_again():
    said = dominating_error(evaluated([BOX, BOX, BOX, FAR]), threshold=0.5, nms_iou_threshold=0.7)
    assert "--model.nms_iou_threshold 0.6" in said


def test_without_errors_that_is_said():
    assert dominating_error(evaluated([BOX, FAR]), threshold=0.5) == "no errors at a score of 0.500."


def test_a_split_without_boxes_has_nothing_to_say_about_precision():
    assert dominating_error(evaluated([], []), threshold=0.5).startswith("there are no boxes to evaluate against")
    said = dominating_error(evaluated([BOX, FAR], []), threshold=0.5)
    assert said.startswith("errors at a score of 0.500, of 0 boxes in 1 images: 2 background.")


def test_the_size_to_try_is_above_that_of_the_run():
    said = dominating_error(evaluated([SHIFTED, FAR]), threshold=0.5, image_size=320, fixed_size=320)
    assert "--data.fixed_size 416" in said and "image_size" not in said
