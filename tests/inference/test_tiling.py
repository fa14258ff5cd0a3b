"""Tiles cover an image, and what lies whole in them comes back at its place, once."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from dino_lightning import Detections
from dino_lightning.inference.tiling import Window, merge, tiles, views

SIZES = st.tuples(st.integers(1, 900), st.integers(1, 900))


@given(size=SIZES, side=st.integers(1, 400), overlap=st.floats(0, 0.9))
@settings(deadline=None, max_examples=200)
def test_tiles_cover_the_image_and_overlap(size, side, overlap):
    assume(max(size) / side < 12)
    windows = tiles(size, side, overlap)
    assert len(set(windows)) == len(windows)
    for axis, length in enumerate(size):
        starts = sorted({(window.top, window.left)[axis] for window in windows})
        reach = min(side, length)
        assert {(window.height, window.width)[axis] for window in windows} == {reach}
        assert starts[0] == 0 and starts[-1] + reach == length
        for one, next_one in itertools.pairwise(starts):
            assert one + reach - next_one >= min(reach - 1, overlap * side - 1e-6)
    rows, columns = {window.top for window in windows}, {window.left for window in windows}
    assert len(windows) == len(rows) * len(columns)


def test_views_add_the_whole_image_where_there_are_several_tiles():
    assert views((300, 500), None, 0.2, whole=True) == [Window(0, 0, 300, 500)]
    assert views((300, 500), 500, 0.2, whole=True) == [Window(0, 0, 300, 500)]
    cut = views((300, 500), 300, 0.2, whole=False)
    assert len(cut) == 2 and all(window.height == window.width == 300 for window in cut)
    assert views((300, 500), 300, 0.2, whole=True) == [*cut, Window(0, 0, 300, 500)]


@pytest.mark.parametrize(("side", "overlap"), [(0, 0.2), (64, -0.1), (64, 0.95)])
def test_tiles_that_cannot_be_are_refused(side, overlap):
    with pytest.raises(ValueError, match="must"):
        tiles((100, 100), side, overlap)


def seen(window, boxes, labels, scores, visible=0.3):
    """What a faultless detector finds in a view: the visible part of each object of which enough is visible."""
    x1, y1, x2, y2 = window.xyxy
    low = torch.tensor([x1, y1, x1, y1])
    part = (boxes - low).clamp(min=0).minimum(torch.tensor([x2 - x1, y2 - y1] * 2))
    shown = (part[:, 2:] - part[:, :2]).prod(-1) / (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    found = Detections(part.float(), scores, labels, ("a", "b", "c"), (5, 6, 9))
    found = found.chosen(shown > visible)
    return found.chosen(found.scores.argsort(descending=True))


def in_order(boxes, labels):
    rows = sorted(zip(labels.tolist(), boxes.tolist(), strict=True))
    return torch.tensor([[label, *box] for label, box in rows])


@given(
    size=st.tuples(st.integers(300, 1000), st.integers(300, 1000)),
    side=st.integers(150, 400),
    whole=st.booleans(),
    objects=st.lists(
        st.tuples(*[st.floats(0, 1)] * 2, *[st.floats(0.15, 0.95)] * 2, st.integers(0, 2), st.floats(0.1, 1)),
        max_size=12,
    ),
)
@settings(deadline=None, max_examples=150)
def test_objects_no_larger_than_the_overlap_come_back_once_at_their_place(size, side, whole, objects):
    overlap = 0.3
    longest = side * overlap - 12  # wholly within a tile, and not at its edge
    boxes, labels = [], []
    for x, y, width, height, label, _ in objects:
        width, height = width * longest, height * longest
        x, y = x * (size[1] - width), y * (size[0] - height)
        boxes.append([x, y, x + width, y + height])
        labels.append(label)
    boxes, labels = torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)
    overlaps = box_iou(boxes, boxes) * (labels[:, None] == labels) - torch.eye(len(boxes))
    assume(not (overlaps > 0.4).any())  # else they could be one object
    scores = torch.tensor([score for *_, score in objects])
    windows = views(size, side, overlap, whole=whole)
    merged = merge([(window, seen(window, boxes, labels, scores, visible=0.5)) for window in windows], size)
    assert len(merged) == len(boxes)
    torch.testing.assert_close(in_order(merged.boxes_xyxy, merged.labels), in_order(boxes, labels), atol=0.01, rtol=0)
    assert (merged.scores[:-1] >= merged.scores[1:]).all()
    torch.testing.assert_close(merged.scores, scores.sort(descending=True).values)
    assert merged.class_names == ("a", "b", "c") and merged.category_ids == (5, 6, 9)


@pytest.mark.parametrize("whole", [True, False])
def test_an_object_larger_than_a_tile_is_one_box(whole):
    size = (600, 2000)
    boxes = torch.tensor([[50.0, 100.0, 1900.0, 400.0], [60.0, 450.0, 120.0, 520.0]])
    windows = views(size, 500, 0.25, whole=whole)
    parts = [(w, seen(w, boxes, torch.tensor([1, 1]), torch.tensor([0.9, 0.8]), visible=0.01)) for w in windows]
    merged = merge(parts, size)
    torch.testing.assert_close(merged.boxes_xyxy, boxes)


def test_neighbours_of_one_label_stay_apart():
    """Rooms in a row, each cut by some tile, with a wall of a few pixels between them."""
    size = (300, 1000)
    boxes = torch.tensor([[x + 3.0, 20.0, x + 117.0, 280.0] for x in range(0, 960, 120)])
    labels, scores = torch.zeros(len(boxes), dtype=torch.int64), torch.linspace(0.9, 0.5, len(boxes))
    windows = views(size, 300, 0.45, whole=True)
    merged = merge([(w, seen(w, boxes, labels, scores, visible=0.1)) for w in windows], size)
    torch.testing.assert_close(merged.boxes_xyxy, boxes)


def test_what_one_view_tells_apart_is_not_suppressed():
    """DINO needs no suppression within a view; two views that differ by some pixels mean one object."""
    size = (300, 480)
    one, other = views(size, 300, 0.4, whole=False)
    pair = torch.tensor([[210.0, 40.0, 260.0, 90.0], [214.0, 40.0, 262.0, 92.0]])
    labels = torch.zeros(2, dtype=torch.int64)
    shift = torch.tensor([other.left, 0, other.left, 0]) - 2
    parts = [
        (one, Detections(pair, torch.tensor([0.9, 0.6]), labels)),
        (other, Detections(pair - shift, torch.tensor([0.8, 0.7]), labels)),
    ]
    merged = merge(parts, size)
    torch.testing.assert_close(merged.boxes_xyxy, pair)
    different = [parts[0], (other, Detections(pair - shift, torch.tensor([0.8, 0.7]), labels + 1))]
    assert len(merge(different, size)) == 4


@pytest.mark.parametrize(("top", "left"), [(30.0, 1), (10.0, 2)])
def test_a_cut_box_that_lies_mostly_in_a_whole_one_is_a_part_of_it(top, left):
    """Nine tenths inside: a part of the object; seven tenths: another one."""
    size = (300, 500)
    one, other = views(size, 300, 0.2, whole=False)
    whole = torch.tensor([[240.0, 40.0, 400.0, 200.0]])
    part = torch.tensor([[260.0, top, 300.0, top + 100]])  # up to the edge of the first view
    label = torch.zeros(1, dtype=torch.int64)
    shift = torch.tensor([other.left, 0, other.left, 0])
    found = [
        (one, Detections(part, torch.tensor([0.9]), label)),
        (other, Detections(whole - shift, torch.ones(1), label)),
    ]
    merged = merge(found, size)
    torch.testing.assert_close(merged.boxes_xyxy, torch.cat([whole, part])[:left])


def test_nothing_found_is_nothing():
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ("a",))
    merged = merge([(window, empty) for window in views((300, 500), 200, 0.2, whole=True)], (300, 500))
    assert len(merged) == 0 and merged.boxes_xyxy.shape == (0, 4) and merged.class_names == ("a",)
    with pytest.raises(ValueError, match="no views"):
        merge([], (300, 500))
