"""The matching and the F1 sweep: worked by hand, and against plain loops on pycocotools' own overlaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask

from dino_lightning.metrics import Matches, PrecisionRecallCurve, match_detections, match_images
from dino_lightning.metrics.curves import coco_overlaps
from dino_lightning.structures import GroundTruth


def truth_of(boxes, labels=None, iscrowd=None):
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return GroundTruth(
        boxes,
        np.zeros(len(boxes), np.int64) if labels is None else np.asarray(labels, np.int64),
        np.zeros(len(boxes), np.bool_) if iscrowd is None else np.asarray(iscrowd, np.bool_),
        (boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
    )


def match(boxes, scores, truth, labels=None, **arguments):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.asarray(labels)
    right, ignored = match_detections(boxes, np.asarray(scores, np.float32), labels, truth, **arguments)
    return right.tolist(), ignored.tolist()


def curve_of(scores, right, num_boxes):
    return PrecisionRecallCurve.from_matches(np.asarray(scores, np.float32), np.asarray(right, np.bool_), num_boxes)


BOX = [0, 0, 10, 10]
NEAR = [0, 0, 10, 8]  # IoU 0.8 with BOX
FAR = [50, 50, 60, 60]


def test_curve_worked_by_hand():
    curve = curve_of([0.9, 0.8, 0.7, 0.6], [True, False, True, False], num_boxes=3)
    np.testing.assert_allclose(curve.scores, [0.9, 0.8, 0.7, 0.6], rtol=1e-6)
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 2 / 3, 2 / 4])
    np.testing.assert_allclose(curve.recall, [1 / 3, 1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(curve.f1, [2 / 4, 2 / 5, 4 / 6, 4 / 7])
    threshold, precision, recall, f1 = curve.best
    assert (threshold, precision, recall, f1) == (pytest.approx(0.7), *[pytest.approx(2 / 3)] * 3)


def test_equal_scores_are_one_threshold_whatever_their_order():
    for right in ([True, False, True], [False, True, True], [True, True, False]):
        curve = curve_of([0.5, 0.5, 0.5], right, num_boxes=2)
        assert curve.scores.tolist() == [0.5]
        assert curve.best == (0.5, 2 / 3, 1, 0.8)


def test_of_equal_f1_the_highest_threshold_is_best():
    # 1 of 1 kept, 1 of 3 boxes: F1 1/2. Later 2 of 5 kept, 2 of 3 boxes: F1 1/2 again.
    curve = curve_of([0.9, 0.8, 0.7, 0.6, 0.5], [True, False, False, False, True], num_boxes=3)
    assert curve.f1[0] == curve.f1[-1] == 0.5
    assert curve.best.threshold == pytest.approx(0.9)


def test_curves_without_detections_or_boxes():
    empty = curve_of([], [], num_boxes=4)
    assert empty.scores.shape == empty.precision.shape == empty.recall.shape == empty.f1.shape == (0,)
    assert empty.best == (0, 0, 0, 0)
    boxless = curve_of([0.9], [False], num_boxes=0)
    assert boxless.best == (pytest.approx(0.9), 0, 0, 0)
    assert curve_of([], [], num_boxes=0).best == (0, 0, 0, 0)


def test_the_threshold_keeps_its_own_detection():
    scores = np.random.default_rng(0).random(50).astype(np.float32)
    curve = curve_of(scores, np.ones(50, np.bool_), num_boxes=50)
    assert np.count_nonzero(scores >= curve.best.threshold) == 50


def test_the_better_score_takes_the_box():
    assert match([NEAR, BOX], [0.9, 0.8], truth_of([BOX])) == ([True, False], [False, False])
    assert match([NEAR, BOX], [0.8, 0.9], truth_of([BOX])) == ([False, True], [False, False])
    assert match([NEAR, BOX], [0.9, 0.9], truth_of([BOX])) == ([True, False], [False, False])


def test_a_detection_takes_the_box_it_overlaps_best_and_leaves_the_other():
    assert match([BOX, NEAR], [0.9, 0.8], truth_of([NEAR, BOX])) == ([True, True], [False, False])
    # The first takes BOX; NEAR as the second detection must not steal it, and FAR is too far.
    assert match([BOX, NEAR], [0.9, 0.8], truth_of([FAR, BOX])) == ([True, False], [False, False])


def test_a_detection_falls_back_to_the_free_box():
    # Both detections prefer BOX, and NEAR is still good enough for the second.
    assert match([BOX, BOX], [0.9, 0.8], truth_of([BOX, NEAR])) == ([True, True], [False, False])


def test_of_equal_overlaps_the_last_box_is_taken():
    left, middle, right = [0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]
    # Either box suits the middle; only the left one suits the left.
    assert match([middle, left], [0.9, 0.8], truth_of([left, right]))[0] == [True, True]
    assert match([middle, left], [0.9, 0.8], truth_of([right, left]))[0] == [True, False]


def test_classes_are_told_apart():
    truth = truth_of([BOX], labels=[1])
    assert match([BOX, BOX], [0.9, 0.8], truth, labels=[0, 1]) == ([False, True], [False, False])


def test_the_threshold_itself_is_enough():
    half = [0, 0, 10, 5]
    assert match([half], [0.9], truth_of([BOX]), iou_threshold=0.5)[0] == [True]
    assert match([half], [0.9], truth_of([BOX]), iou_threshold=0.51)[0] == [False]
    assert match([BOX], [0.9], truth_of([BOX]), iou_threshold=1.0)[0] == [True]


def test_a_crowd_region_excuses_but_never_rewards():
    crowd = [0, 0, 100, 100]
    truth = truth_of([crowd, BOX], iscrowd=[True, False])
    boxes = [BOX, BOX, FAR, FAR, [95, 95, 115, 115]]
    # The first takes the box; a repeat and two strays lie inside the region; the last mostly outside.
    assert match(boxes, [0.9, 0.8, 0.7, 0.6, 0.5], truth) == (
        [True, False, False, False, False],
        [False, True, True, True, False],
    )
    # Another class is not excused.
    assert match([FAR], [0.9], truth, labels=[1]) == ([False], [False])


def test_ignored_detections_make_no_threshold():
    crowd = truth_of([[0, 0, 100, 100], [200, 200, 210, 210]], iscrowd=[True, False])
    boxes = np.array([BOX, [200, 200, 210, 210]], np.float32)
    matches = match_images([(boxes, np.array([0.9, 0.5], np.float32), np.zeros(2, np.int64), crowd)], 1)
    assert matches.num_boxes.tolist() == [1]
    assert matches.curve().scores.tolist() == [0.5]
    assert matches.curve().best == (0.5, 1, 1, 1)


def test_no_images():
    matches = match_images([], 2)
    assert matches.curve().best == (0, 0, 0, 0)
    assert [curve.best.f1 for curve in matches.class_curves()] == [0, 0]
    assert match_images([], 0).class_curves() == []


def scene(seed, num_classes):
    """Boxes on a coarse grid, so that overlaps and scores are often equal."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner = rng.integers(0, 4, (n, 2)) * 4
        return np.concatenate((corner, corner + rng.integers(1, 4, (n, 2)) * 4), axis=1).astype(np.float64)

    n, d = rng.integers(0, 7), rng.integers(0, 13)
    truth = truth_of(boxes(n), rng.integers(0, num_classes, n), rng.random(n) < 0.25)
    scores = np.round(rng.random(d), 1).astype(np.float32)
    return boxes(d).astype(np.float32), scores, rng.integers(0, num_classes, d), truth


def plain_match(boxes, scores, labels, truth, iou_threshold):
    """pycocotools' `evaluateImg`, loop for loop, on pycocotools' own overlaps."""
    right, ignored = [False] * len(scores), [False] * len(scores)
    for label in set(labels.tolist()):
        mine = [i for i in np.argsort(-scores, kind="stable") if labels[i] == label]
        theirs = [j for j in range(len(truth.labels)) if truth.labels[j] == label]
        theirs.sort(key=lambda j: truth.iscrowd[j])
        if not theirs:
            continue

        def xywh(corners):
            corners = corners.astype(np.float64)
            return np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)

        overlaps = mask.iou(xywh(boxes[mine]), xywh(truth.boxes_xyxy[theirs]), [int(truth.iscrowd[j]) for j in theirs])
        taken = set()
        for row, i in enumerate(mine):
            best, best_overlap = None, min(iou_threshold, 1 - 1e-10)
            for column, j in enumerate(theirs):
                if j in taken and not truth.iscrowd[j]:
                    continue
                if best is not None and not truth.iscrowd[best] and truth.iscrowd[j]:
                    break
                if overlaps[row, column] < best_overlap:
                    continue
                best, best_overlap = j, overlaps[row, column]
            if best is not None:
                taken.add(best)
                right[i], ignored[i] = not truth.iscrowd[best], bool(truth.iscrowd[best])
    return right, ignored


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_classes=st.integers(1, 3), iou=st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_matching_equals_the_plain_loop(seed, num_classes, iou):
    boxes, scores, labels, truth = scene(seed, num_classes)
    expected = plain_match(boxes, scores, labels, truth, iou)
    right, ignored = match_detections(boxes, scores, labels, truth, iou_threshold=iou)
    assert (right.tolist(), ignored.tolist()) == expected


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_overlaps_equal_pycocotools(seed):
    rng = np.random.default_rng(seed)
    boxes, truth = (rng.random((n, 2)) * 50 for n in (6, 5))
    boxes = np.concatenate((boxes, boxes + rng.random((6, 2)) * 40), axis=1).astype(np.float32)
    truth = np.concatenate((truth, truth + rng.random((5, 2)) * 40), axis=1)
    iscrowd = rng.random(5) < 0.4
    wide = boxes.astype(np.float64)
    expected = mask.iou(
        np.concatenate((wide[:, :2], wide[:, 2:] - wide[:, :2]), axis=1),
        np.concatenate((truth[:, :2], truth[:, 2:] - truth[:, :2]), axis=1),
        iscrowd.astype(int).tolist(),
    )
    np.testing.assert_array_equal(coco_overlaps(boxes, truth, iscrowd), expected)


def plain_best_f1(entries, num_boxes):
    """Try every score; entries are (score, right) of the detections that count."""
    best = 0.0
    for threshold in {score for score, _ in entries}:
        kept = [right for score, right in entries if score >= threshold]
        precision = sum(kept) / len(kept)
        recall = sum(kept) / num_boxes if num_boxes else 0.0
        if precision + recall:
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


@settings(max_examples=100, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**32 - 1), max_size=4), num_classes=st.integers(1, 3))
def test_best_f1_equals_brute_force(seeds, num_classes):
    scenes = [scene(seed, num_classes) for seed in seeds]
    entries = {label: [] for label in range(num_classes)}
    num_boxes = dict.fromkeys(range(num_classes), 0)
    for boxes, scores, labels, truth in scenes:
        right, ignored = plain_match(boxes, scores, labels, truth, 0.5)
        for score, label, is_right, is_ignored in zip(scores.tolist(), labels.tolist(), right, ignored, strict=True):
            if not is_ignored:
                entries[label].append((score, is_right))
        for label, crowd in zip(truth.labels.tolist(), truth.iscrowd.tolist(), strict=True):
            num_boxes[label] += not crowd
    matches: Matches = match_images(scenes, num_classes)
    for label, curve in enumerate(matches.class_curves()):
        assert curve.best.f1 == pytest.approx(plain_best_f1(entries[label], num_boxes[label]))
    pooled = [entry for per_class in entries.values() for entry in per_class]
    best = matches.curve().best
    assert best.f1 == pytest.approx(plain_best_f1(pooled, sum(num_boxes.values())))
    if best.f1:
        assert best.f1 == pytest.approx(2 * best.precision * best.recall / (best.precision + best.recall))
        kept = [right for score, right in pooled if score >= best.threshold]
        assert best.precision == pytest.approx(sum(kept) / len(kept))
