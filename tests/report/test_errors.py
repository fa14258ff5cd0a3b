"""The kind of each detection: cases worked by hand, and invariants that hold for any detections."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning.metrics import EvaluatedImage, match_detections
from dino_lightning.report.errors import (
    CORRECTABLE_KINDS,
    ERROR_KINDS,
    FALSE_KINDS,
    NEARBY,
    classify_image,
    f1_of,
    f1_without,
)
from dino_lightning.structures import GroundTruth

BOX = [10, 10, 60, 60]
FAR = [200, 200, 260, 260]
SHIFTED = [30, 10, 80, 60]  # IoU 0.43 with BOX
ELSEWHERE = [300, 10, 350, 60]
TENTH = [10, 10, 60, 15]  # IoU 0.1 with BOX
LESS = [10, 10, 60, 14]  # IoU 0.08 with BOX
HALF = [10, 10, 60, 35]  # IoU 0.5 with BOX


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
    "correct": ([(BOX, 0, 0.9)], [(BOX, 0)], ["correct"], []),
    "duplicate": ([(BOX, 0, 0.9), (BOX, 0, 0.8)], [(BOX, 0)], ["correct", "duplicate"], []),
    "classification": ([(BOX, 1, 0.9)], [(BOX, 0)], ["classification"], ["classification"]),
    "a second class on a box that is found": (
        [(BOX, 0, 0.9), (BOX, 1, 0.8)],
        [(BOX, 0)],
        ["correct", "classification"],
        [],
    ),
    "localization": ([(SHIFTED, 0, 0.9)], [(BOX, 0)], ["localization"], ["localization"]),
    "near a box of another class": ([(SHIFTED, 1, 0.9)], [(BOX, 0)], ["both"], ["unseen"]),
    "least overlap with a box of another class": ([(TENTH, 1, 0.9)], [(BOX, 0)], ["both"], ["unseen"]),
    "less overlap than that": ([(LESS, 1, 0.9)], [(BOX, 0)], ["background"], ["unseen"]),
    "half a box of another class": ([(HALF, 1, 0.9)], [(BOX, 0)], ["classification"], ["classification"]),
    "near boxes of its class and of another": (
        [(SHIFTED, 1, 0.9)],
        [(BOX, 0), (TENTH, 1), ([60, 10, 110, 60], 1)],
        ["localization"],
        ["unseen", "unseen", "localization"],
    ),
    "near a box of another class that is found": (
        [(BOX, 0, 0.9), (SHIFTED, 1, 0.8)],
        [(BOX, 0)],
        ["correct", "both"],
        [],
    ),
    "near a box of another class, found below the threshold": (
        [(SHIFTED, 1, 0.9), (BOX, 0, 0.4)],
        [(BOX, 0)],
        ["both"],
        ["low_score"],
    ),
    "near a crowd of another class": ([(SHIFTED, 1, 0.9)], [(BOX, 0, "crowd")], ["background"], []),
    "background": ([(FAR, 0, 0.9)], [(BOX, 0)], ["background"], ["unseen"]),
    "below the threshold": ([(BOX, 0, 0.4)], [(BOX, 0)], [], ["low_score"]),
    "at the threshold": ([(BOX, 0, 0.5)], [(BOX, 0)], ["correct"], []),
    "in a crowd": ([(BOX, 0, 0.9)], [(BOX, 0, "crowd")], ["ignored"], []),
    "in a crowd of another class": ([(BOX, 1, 0.9)], [(BOX, 0, "crowd")], ["background"], []),
    "nothing": ([], [], [], []),
    "missed": ([], [(BOX, 0), (FAR, 1)], [], ["unseen", "unseen"]),
    "a correct neighbour explains nothing": (
        [(SHIFTED, 0, 0.9)],
        [(BOX, 0), (SHIFTED, 0)],
        ["correct"],
        ["unseen"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds(case):
    found, truth, kinds, reasons = CASES[case]
    classified = classify_image(image_of(found, truth), threshold=0.5)
    assert [one.kind for one in classified.detections] == kinds
    assert [one.reason for one in classified.missed] == reasons


def test_a_wrong_detection_can_take_each_missed_box_once():
    classified = classify_image(image_of([(BOX, 1, 0.9), (BOX, 2, 0.8)], [(BOX, 0)]), threshold=0.5)
    assert [(one.kind, one.about, one.instead_of) for one in classified.detections] == [
        ("classification", 0, 0),
        ("classification", 0, -1),
    ]
    assert classified.detections[0].overlap == pytest.approx(1)


def test_a_detection_that_is_wrong_in_both_names_the_box_but_takes_none():
    classified = classify_image(image_of([(SHIFTED, 1, 0.9)], [(FAR, 1), (TENTH, 2), (BOX, 0)]), threshold=0.5)
    (one,) = classified.detections
    assert (one.kind, one.about, one.instead_of) == ("both", 2, -1)
    assert one.overlap == pytest.approx(3 / 7)  # 30 of 70 columns


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
    classified = classify_image(image, threshold=threshold)
    counts = {kind: classified.count(kind) for kind in ("correct", "ignored", *ERROR_KINDS)}
    kept = image.scores >= np.float32(threshold)
    assert counts["correct"] + counts["missed"] == classified.num_boxes == (~image.truth.iscrowd).sum()
    assert sum(counts[kind] for kind in ("correct", "ignored", *FALSE_KINDS)) == kept.sum()
    # the very detections that F1 counts as true positives, and leaves out
    correct, ignored = match_detections(image.boxes_xyxy, image.scores, image.labels, image.truth)
    assert {one.index for one in classified.detections if one.kind == "correct"} == set(np.flatnonzero(correct & kept))
    assert {one.index for one in classified.detections if one.kind == "ignored"} == set(np.flatnonzero(ignored & kept))
    taken = [one.about for one in classified.detections if one.kind == "correct"]
    missed = [one.index for one in classified.missed]
    assert len(set(taken + missed)) == len(taken) + len(missed) == classified.num_boxes
    for kind in FALSE_KINDS:
        instead = [one.instead_of for one in classified.detections if one.kind == kind and one.instead_of >= 0]
        assert len(set(instead)) == len(instead)
        assert set(instead) <= set(missed)


@settings(max_examples=300, deadline=None)
@given(image=scenes(), threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_a_false_positive_is_of_the_kind_that_its_overlaps_say(image, threshold):
    truth = image.truth
    for one in classify_image(image, threshold=threshold).detections:
        if one.kind not in FALSE_KINDS:
            continue
        x1, y1, x2, y2 = image.boxes_xyxy[one.index].tolist()
        overlaps = {True: 0.0, False: 0.0}  # the largest with a box of its class, and of another one
        for (a1, b1, a2, b2), label, crowd in zip(truth.boxes_xyxy.tolist(), truth.labels, truth.iscrowd, strict=True):
            common = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common
            own = bool(label == one.label)
            overlaps[own] = max(overlaps[own], 0.0 if crowd else common / union)
        own, other = overlaps[True], overlaps[False]
        if own >= 0.5:
            assert one.kind == "duplicate"
        elif other >= 0.5:
            assert one.kind == "classification"
        elif own >= NEARBY:
            assert one.kind == "localization"
        elif other >= NEARBY:
            assert one.kind == "both"
        else:
            assert one.kind == "background"
        assert (one.about >= 0) == (one.kind != "background")
        assert one.kind in CORRECTABLE_KINDS or one.instead_of == -1


def test_f1_without_the_detections_that_are_wrong_in_both():
    counts = {"correct": 4, "missed": 2, "duplicate": 0, "classification": 0, "localization": 0, "both": 3}
    counts["background"] = 1
    assert f1_of(4, 4, 2) == pytest.approx(8 / 14)
    assert f1_without("both", counts, {}, explained=0) == pytest.approx(8 / 11)  # they go, the boxes stay missed


@settings(max_examples=200, deadline=None)
@given(
    counts=st.fixed_dictionaries({kind: st.integers(0, 20) for kind in ("correct", *ERROR_KINDS)}),
    share=st.floats(0, 1),
)
def test_no_error_less_makes_f1_worse(counts, share):
    correctable = {kind: int(share * min(counts[kind], counts["missed"])) for kind in CORRECTABLE_KINDS}
    now = f1_of(counts["correct"], sum(counts[kind] for kind in FALSE_KINDS), counts["missed"])
    for kind in ERROR_KINDS:
        without = f1_without(kind, counts, correctable, explained=int(share * counts["missed"]))
        assert now - 1e-12 <= without <= 1
