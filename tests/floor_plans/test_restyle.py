"""Other styles of a page: rooms stay where their walls are, and the same draws give the same page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dino_lightning.floor_plans.dataset import draw_plan
from dino_lightning.floor_plans.drawing import Room
from dino_lightning.floor_plans.restyle import (
    black_and_white,
    by_hand,
    fill_rooms,
    other_colours,
    photograph,
    recolour,
    restyle,
    small_copy,
    watermark,
)

SQUARE = Room(((60.0, 40.0), (140.0, 40.0), (140.0, 110.0), (60.0, 110.0)), "HALL")


def page_with(room: Room) -> Image.Image:
    """A white page with a black room."""
    page = Image.new("RGB", (200, 150), (255, 255, 255))
    ImageDraw.Draw(page).polygon(room.polygon, fill=(0, 0, 0))
    return page


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
@example(seed=259)
def test_the_outline_follows_a_photographed_room(seed):
    seen, rooms = photograph(page_with(SQUARE), [SQUARE], np.random.default_rng(seed))
    dark = np.asarray(seen.convert("L"))
    mask = Image.new("L", seen.size)
    ImageDraw.Draw(mask).polygon(rooms[0].polygon, fill=255)
    inside = np.asarray(mask) > 0
    shrunk = np.asarray(mask.resize((20, 15)).resize(seen.size)) > 250
    assert (dark[shrunk] < 30).all()
    x0, y0, x1, y1 = rooms[0].bbox_xyxy
    assert 0 < x0 < x1 < 200 and 0 < y0 < y1 < 150
    around = np.asarray(mask.resize((40, 30)).resize(seen.size)) > 0  # the corners of a photograph are dark, too
    assert abs(inside.sum() - (around & (dark < 25)).sum()) < 0.1 * inside.sum()


def test_rooms_are_tinted_and_nothing_else():
    white = Image.new("RGB", (200, 150), (255, 255, 255))
    tinted = np.asarray(fill_rooms(white, [SQUARE], np.random.default_rng(3)))
    assert (tinted[75, 100] != 255).any()
    assert (tinted[:35] == 255).all() and (tinted[:, 145:] == 255).all()


@pytest.mark.parametrize("seed", range(8))
def test_ink_and_paper_change_and_lines_stay_visible(seed):
    page = np.asarray(recolour(page_with(SQUARE), np.random.default_rng(seed))).astype(int)
    assert np.abs(page[75, 100] - page[5, 5]).max() > 60


def test_copies_and_words_keep_the_size():
    page = page_with(SQUARE)
    assert small_copy(page, 0.5).size == page.size
    marked = watermark(Image.new("RGB", (200, 150), (255, 255, 255)), np.random.default_rng(1))
    assert np.asarray(marked).min() < 255


@pytest.mark.parametrize("seed", range(6))
def test_rooms_stay_where_they_are_by_hand_by_fax_and_on_other_screens(seed):
    inside = np.zeros((150, 200), dtype=bool)
    inside[44:107, 64:137] = True
    outside = np.ones((150, 200), dtype=bool)
    outside[36:115, 56:145] = False
    for change in (by_hand, black_and_white, other_colours):
        seen = np.asarray(change(page_with(SQUARE), np.random.default_rng(seed)).convert("L")).astype(int)
        assert abs(np.median(seen[inside]) - np.median(seen[outside])) > 100
        assert np.ptp(seen[inside]) < 20


def test_the_same_draws_give_the_same_page():
    page, rooms = draw_plan(11, style="realistic", size=160)
    one, other = (restyle(page, rooms, np.random.default_rng(9)) for _ in range(2))
    assert one[0].tobytes() == other[0].tobytes() and one[1] == other[1]
    assert one[0].mode == "RGB" and len(one[1]) == len(rooms)
