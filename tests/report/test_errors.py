"""What each detection is taken for: cases by hand, and sums that must come out for any detections."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning.metrics import EvaluatedImage, match_detections
from dino_lightning.report.errors import ERROR_KINDS, FALSE_KINDS, classify_image, f1_of, f1_without
from dino_lightning.structures import GroundTruth

BOX = [10, 10, 60, 60]
FAR = [200, 200, 260, 260]
SHIFTED = [30, 10, 80, 60]  # IoU 0.43 with BOX
ELSEWHERE = [300, 10, 350, 60]


def image_of(found, truth):
    """From (box, label, score) and (box, label[, crowd])."""
    boxes = np.array([row[0] for row in truth], np.float64).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    crowd = np.array([len(row) > 2 for row in truth], np.bool_)
    return EvaluatedImage(
        np.array([row[0] for row in found], np.float32).reshape(-1, 4),
        np.array([row[2] for row in found], np.float32),
        np.array([row[1] for row in found], np.int64),
        GroundTruth(boxes, np.array([row[1] for row in truth], np.int64), crowd, sides.prod(axis=1)),
    )


CASES = {
    "right": ([(BOX, 0, 0.9)], [(BOX, 0)], ["right"], []),
    "duplicate": ([(BOX, 0, 0.9), (BOX, 0, 0.8)], [(BOX, 0)], ["right", "duplicate"], []),
    "wrong class": ([(BOX, 1, 0.9)], [(BOX, 0)], ["wrong_class"], ["wrong_class"]),
    "a second class on a box that is found": (
        [(BOX, 0, 0.9), (BOX, 1, 0.8)],
        [(BOX, 0)],
        ["right", "wrong_class"],
        [],
    ),
    "wrong place": ([(SHIFTED, 0, 0.9)], [(BOX, 0)], ["wrong_place"], ["wrong_place"]),
    "near a box of another class": ([(SHIFTED, 1, 0.9)], [(BOX, 0)], ["background"], ["unseen"]),
    "background": ([(FAR, 0, 0.9)], [(BOX, 0)], ["background"], ["unseen"]),
    "below the threshold": ([(BOX, 0, 0.4)], [(BOX, 0)], [], ["low_score"]),
    "at the threshold": ([(BOX, 0, 0.5)], [(BOX, 0)], ["right"], []),
    "in a crowd": ([(BOX, 0, 0.9)], [(BOX, 0, "crowd")], ["ignored"], []),
    "in a crowd of another class": ([(BOX, 1, 0.9)], [(BOX, 0, "crowd")], ["background"], []),
    "nothing": ([], [], [], []),
    "missed": ([], [(BOX, 0), (FAR, 1)], [], ["unseen", "unseen"]),
    "a right neighbour explains nothing": (
        [(SHIFTED, 0, 0.9)],
        [(BOX, 0), (SHIFTED, 0)],
        ["right"],
        ["unseen"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds(case):
    found, truth, kinds, reasons = CASES[case]
    judged = classify_image(image_of(found, truth), threshold=0.5)
    assert [one.kind for one in judged.detections] == kinds
    assert [one.reason for one in judged.missed] == reasons


def test_a_wrong_detection_can_take_each_missed_box_once():
    judged = classify_image(image_of([(BOX, 1, 0.9), (BOX, 2, 0.8)], [(BOX, 0)]), threshold=0.5)
    assert [(one.kind, one.about, one.instead_of) for one in judged.detections] == [
        ("wrong_class", 0, 0),
        ("wrong_class", 0, -1),
    ]
    assert judged.detections[0].overlap == pytest.approx(1)


def test_f1_of_an_image():
    assert classify_image(image_of([], []), threshold=0.5).f1 == 1
    assert classify_image(image_of([(BOX, 0, 0.9)], []), threshold=0.5).f1 == 0
    assert classify_image(
        image_of([(BOX, 0, 0.9), (ELSEWHERE, 0, 0.9)], [(BOX, 0)]), threshold=0.5
    ).f1 == pytest.approx(2 / 3)


@st.composite
def scenes(draw):
    place = st.integers(0, 6).map(lambda n: [20 * n, 10, 20 * n + 40, 60])
    found = draw(st.lists(st.tuples(place, st.integers(0, 2), st.integers(0, 10).map(lambda n: n / 10)), max_size=12))
    truth = draw(
        st.lists(
            st.one_of(st.tuples(place, st.integers(0, 2)), st.tuples(place, st.integers(0, 2), st.just(1))), max_size=8
        )
    )
    return image_of(found, truth)


@settings(max_examples=300, deadline=None)
@given(image=scenes(), threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_everything_is_counted_once(image, threshold):
    judged = classify_image(image, threshold=threshold)
    counts = {kind: judged.count(kind) for kind in ("right", "ignored", *ERROR_KINDS)}
    kept = image.scores >= np.float32(threshold)
    assert counts["right"] + counts["missed"] == judged.num_boxes == (~image.truth.iscrowd).sum()
    assert sum(counts[kind] for kind in ("right", "ignored", *FALSE_KINDS)) == kept.sum()
    # the very detections that F1 calls right, and leaves out
    right, ignored = match_detections(image.boxes_xyxy, image.scores, image.labels, image.truth)
    assert {one.index for one in judged.detections if one.kind == "right"} == set(np.flatnonzero(right & kept))
    assert {one.index for one in judged.detections if one.kind == "ignored"} == set(np.flatnonzero(ignored & kept))
    taken = [one.about for one in judged.detections if one.kind == "right"]
    missed = [one.index for one in judged.missed]
    assert len(set(taken + missed)) == len(taken) + len(missed) == judged.num_boxes
    for kind in FALSE_KINDS:
        instead = [one.instead_of for one in judged.detections if one.kind == kind and one.instead_of >= 0]
        assert len(set(instead)) == len(instead)
        assert set(instead) <= set(missed)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.fixed_dictionaries({kind: st.integers(0, 20) for kind in ("right", *ERROR_KINDS)}),
    share=st.floats(0, 1),
)
def test_no_error_less_makes_f1_worse(counts, share):
    put_right = {kind: int(share * min(counts[kind], counts["missed"])) for kind in ("wrong_class", "wrong_place")}
    now = f1_of(counts["right"], sum(counts[kind] for kind in FALSE_KINDS), counts["missed"])
    for kind in ERROR_KINDS:
        without = f1_without(kind, counts, put_right, explained=int(share * counts["missed"]))
        assert now - 1e-12 <= without <= 1
