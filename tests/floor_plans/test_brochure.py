"""Pages as brochures show them: rooms move with the plan, and colour goes where walls, floors and furniture are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dino_lightning.floor_plans.brochure import cut_close, on_a_sheet
from dino_lightning.floor_plans.drawing import Room
from dino_lightning.floor_plans.materials import colour_furniture, lay_floors, paint_walls, soft_light, wall_mask

ROOM = Room(((60.0, 40.0), (140.0, 40.0), (140.0, 110.0), (60.0, 110.0)), "HALL")


def plan() -> Image.Image:
    """A white page of 200 x 150: a room with walls of 6 pixels, a thin line in it and a table of 12 x 10 pixels."""
    page = Image.new("RGB", (200, 150), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    draw.rectangle((54, 34, 146, 116), fill=(0, 0, 0))
    draw.rectangle((60, 40, 140, 110), fill=(255, 255, 255))
    draw.line((70, 60, 130, 60), fill=(0, 0, 0))
    draw.rectangle((90, 80, 103, 91), outline=(0, 0, 0))
    return page


def corner_of(page: Image.Image) -> tuple[int, int]:
    """Where the first black pixel of the walls lies."""
    ys, xs = np.nonzero(np.asarray(page.convert("L")) < 5)
    return int(xs.min()), int(ys.min())


@pytest.mark.parametrize("change", [cut_close, on_a_sheet])
@pytest.mark.parametrize("seed", range(12))
def test_rooms_move_with_the_plan(change, seed):
    page, rooms = change(plan(), [ROOM], np.random.default_rng(seed))
    x0, y0, x1, y1 = (int(value) for value in rooms[0].bbox_xyxy)
    assert 0 <= x0 < x1 <= page.width and 0 <= y0 < y1 <= page.height
    was = np.asarray(plan())[40:110, 60:140]
    assert (np.asarray(page)[y0:y1, x0:x1] == was).all()


def test_a_plan_is_cut_out_closely_and_a_page_without_rooms_is_left_alone():
    page, rooms = cut_close(plan(), [ROOM], np.random.default_rng(0))
    x0, y0, x1, y1 = rooms[0].bbox_xyxy
    assert max(x0, y0, page.width - x1, page.height - y1) < 10
    assert cut_close(plan(), [], np.random.default_rng(0))[0].size == (200, 150)


def test_sheets_are_larger_and_written_on():
    sizes, full = set(), 0
    for seed in range(12):
        page, _ = on_a_sheet(plan(), [ROOM], np.random.default_rng(seed))
        sizes.add(page.size)
        full += int((np.asarray(page) < 250).sum() > 2 * (np.asarray(plan()) < 250).sum())
    assert len(sizes) > 6 and full > 6
    assert all(width >= 200 and height >= 150 for width, height in sizes)


def test_walls_are_the_thick_strokes_only():
    mask = wall_mask(plan())
    assert mask[75, 57] and mask[37, 100] and mask[113, 143]
    assert not mask[60, 100] and not mask[80, 95] and not mask[20, 20]


@pytest.mark.parametrize("seed", range(8))
def test_only_walls_change_their_colour(seed):
    before, after = (
        np.asarray(plan()).astype(int),
        np.asarray(paint_walls(plan(), np.random.default_rng(seed))).astype(int),
    )
    changed = np.abs(before - after).max(-1) > 0
    assert changed[wall_mask(plan())].mean() > 0.3
    assert (after[60, 70:130] <= before[60, 70:130]).all()  # at most a shadow


def test_floors_lie_in_rooms_and_lines_stay_dark():
    outside = np.ones((150, 200), dtype=bool)
    outside[40:111, 60:141] = False
    covered = 0
    for seed in range(8):
        floored = np.asarray(lay_floors(plan(), [ROOM], np.random.default_rng(seed)))
        assert (floored[outside] == np.asarray(plan())[outside]).all()
        assert (floored[60, 70:130] == 0).all()
        covered += int((floored < 255).any(-1)[45:55, 65:135].mean() > 0.5)
    assert covered >= 6  # one room in ten is left as it was


def test_furniture_is_coloured_and_its_room_is_not():
    found = 0
    for seed in range(6):
        coloured = np.asarray(colour_furniture(plan(), [ROOM], np.random.default_rng(seed)))
        assert (coloured[50, 65:135] == 255).all() and (coloured[10] == 255).all()
        found += int((coloured[85, 96] < 255).any())
    assert found >= 3
    assert (np.asarray(colour_furniture(plan(), [], np.random.default_rng(0))) == np.asarray(plan())).all()


def test_pages_without_walls_or_light_areas_come_through():
    black, white = (Image.new("RGB", (64, 48), colour) for colour in ("black", "white"))
    for page in (black, white):
        rng = np.random.default_rng(1)
        for seen in (paint_walls(page, rng), colour_furniture(page, [ROOM], rng), soft_light(page, rng)):
            assert seen.size == page.size and seen.mode == "RGB"
