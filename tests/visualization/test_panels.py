"""Sheets of images: captions can be read, and panels keep their proportions."""

import numpy as np
import pytest

from dino_lightning.files import save_figure
from dino_lightning.visualization.panels import Panel, _colour, draw_panels, scaled_for_sheet


def panel(height, width, boxes=20, classes=80, **changes):
    generator = np.random.default_rng(height * width + boxes)
    corners = np.sort(generator.random((boxes, 2, 2)), axis=1).reshape(boxes, 4) * [width, height, width, height]
    labels = generator.integers(0, classes, boxes).tolist()
    names = ["cat", "traffic light", "hair drier", "WWWWW"]
    return Panel(
        pixels=np.full((height, width, 3), 128, dtype=np.uint8),
        boxes_xyxy=corners,
        labels=labels,
        captions=[names[label % 4] for label in labels],
        truth_xyxy=np.zeros((0, 4)),
        **{"title": f"{height} x {width}\nsecond line", **changes},
    )


@pytest.mark.parametrize("boxes", [3, 40, 300])
def test_captions_lie_in_the_image_and_not_on_each_other(boxes):
    figure = draw_panels([panel(400, 600, boxes), panel(600, 300, boxes)], "heading")
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        frame = axes.get_window_extent(renderer)
        places = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(places) == boxes if boxes == 3 else len(places) > 10
        for index, place in enumerate(places):
            assert frame.x0 - 2 <= place.x0 and place.x1 <= frame.x1 + 2
            assert frame.y0 - 2 <= place.y0 and place.y1 <= frame.y1 + 2
            for other in places[:index]:
                width = min(place.x1, other.x1) - max(place.x0, other.x0)
                height = min(place.y1, other.y1) - max(place.y0, other.y0)
                assert width < 2 or height < 2


@pytest.mark.parametrize(
    "sizes",
    [
        [(100, 100)],
        [(40, 4000), (4000, 40), (1, 1)],
        [(300, 400), (400, 300)] * 8,
        [(120, 80)] * 7,
    ],
    ids=str,
)
def test_panels_keep_their_proportions_and_do_not_overlap(sizes, tmp_path):
    figure = draw_panels([panel(*size, boxes=2) for size in sizes], "heading")
    width, height = figure.get_size_inches()
    assert len(figure.axes) == len(sizes)
    frames = [axes.get_position() for axes in figure.axes]
    for (rows, columns), frame in zip(sizes, frames, strict=True):
        assert min(frame.x0, frame.y0) >= 0 and max(frame.x1, frame.y1) <= 1
        assert frame.width * width / (frame.height * height) == pytest.approx(columns / rows)
    for index, frame in enumerate(frames):
        for other in frames[:index]:
            assert frame.x1 <= other.x0 or other.x1 <= frame.x0 or frame.y1 <= other.y0 or other.y1 <= frame.y0
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_neighbouring_classes_have_colours_of_their_own():
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(_colour(label)) for label in range(80)])
    distances = np.abs(colours[:, None] - colours[None]).max(-1) + np.eye(80)
    assert distances.min() > 0.02


def test_of_a_long_title_the_end_is_shown():
    name = "/".join(["a folder with a long name"] * 6) + "/plan.png"
    figure = draw_panels([panel(400, 600, 2, title=name), panel(400, 600, 2, title="short.png")], "heading")
    renderer = figure.canvas.get_renderer()
    long, short = figure.texts[1:]
    assert long.get_text().startswith("...") and long.get_text().endswith("/plan.png")
    assert long.get_window_extent(renderer).x1 <= short.get_window_extent(renderer).x0
    assert short.get_text() == "short.png"


@pytest.mark.parametrize(
    ("size", "expected"),
    [((770, 2310), (770, 2310)), ((1540, 1000), (770, 500)), ((90, 4620), (45, 2310)), ((9000, 1), (770, 1))],
)
def test_images_are_scaled_down_only_as_far_as_a_sheet_needs(size, expected):
    assert scaled_for_sheet(np.zeros((*size, 3), dtype=np.uint8)).shape == (*expected, 3)
