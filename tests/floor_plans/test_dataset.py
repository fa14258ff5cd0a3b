"""The synthetic plans: what is drawn where the boxes say, the same from the same seed, safely on disk."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from dino_lightning.floor_plans import Room, Style, draw_plan, write_rooms_dataset
from dino_lightning.floor_plans.drawing import font
from dino_lightning.floor_plans.geometry import merge, offset, rectangle, signed_area
from dino_lightning.floor_plans.house import house_layout
from dino_lightning.floor_plans.layout import shared_walls, simple_layout
from dino_lightning.floor_plans.scan import page_without_plan, rotate
from dino_lightning.floor_plans.words import AGENTS, DISCLAIMER, NAMES, OUTDOOR_NAMES

few = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 10**9)
styles = st.sampled_from(("clean", "realistic"))


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def load_coco(annotations: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))


def mask_of(rooms: list[Room], size: tuple[int, int], scale: int = 1) -> np.ndarray:
    """How many rooms cover each pixel."""
    total = np.zeros((size[1] * scale, size[0] * scale), dtype=int)
    for room in rooms:
        layer = Image.new("L", (size[0] * scale, size[1] * scale), 0)
        ImageDraw.Draw(layer).polygon([(x * scale, y * scale) for x, y in room.polygon], fill=1)
        total += np.asarray(layer)
    return total


@few
@given(seeds, styles)
def test_same_seed_same_plan(seed: int, style: Style) -> None:
    first, first_rooms = draw_plan(seed, style=style, size=200)
    second, second_rooms = draw_plan(seed, style=style, size=200)
    assert first.mode == second.mode and first.tobytes() == second.tobytes()
    assert first_rooms == second_rooms


@pytest.mark.parametrize("style", ["clean", "realistic"])
def test_other_seeds_other_plans(style: Style) -> None:
    pictures = {draw_plan(seed, style=style, size=160)[0].tobytes() for seed in range(12)}
    assert len(pictures) == 12


def test_drawing_leaves_the_global_random_state_alone() -> None:
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    draw_plan(3, style="realistic", size=200)
    assert (np.random.get_state()[1] == before).all()


@few
@given(seeds, styles, st.sampled_from((96, 240, 700)))
def test_rooms_lie_on_the_page(seed: int, style: Style, size: int) -> None:
    picture, rooms = draw_plan(seed, style=style, size=size)
    assert abs(max(picture.size) - size) <= 1
    assert len(rooms) <= (9 if style == "clean" else 20)
    for room in rooms:
        x0, y0, x1, y1 = room.bbox_xyxy
        assert 0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height
        assert 0 < room.area <= (x1 - x0) * (y1 - y0) * (1 + 1e-9)
        assert room.name


@few
@given(seeds)
def test_clean_rooms_are_large_and_apart(seed: int) -> None:
    picture, rooms = draw_plan(seed)
    assert 2 <= len(rooms) <= 9
    assert 200 <= max(picture.size) <= 320
    boxes = np.array([room.bbox_xyxy for room in rooms])
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 0.1 * max(picture.size)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(-1)
    assert overlap[~np.eye(len(rooms), dtype=bool)].sum() == 0
    assert sum(room.area for room in rooms) > 0.5 * picture.width * picture.height


def test_clean_layouts_have_no_narrow_room() -> None:
    for seed in range(30):
        layout = simple_layout(
            width=9.0,
            height=7.0,
            num_rooms=9,
            min_side=1.2,
            inner_wall=0.1,
            outer_wall=0.2,
            rng=np.random.default_rng(seed),
        )
        outlines = [np.array(offset(cell.outline, 0.05)) for cell in layout.cells]
        assert min(np.ptp(outline, axis=0).min() for outline in outlines) >= 1.2
        covered = sum(signed_area(cell.outline) for cell in layout.cells)
        assert covered == pytest.approx((9.0 - 0.3) * (7.0 - 0.3))


@few
@given(seeds, st.booleans())
def test_realistic_rooms_do_not_overlap(seed: int, wings: bool) -> None:
    picture, rooms = draw_plan(seed, style="realistic", size=300, wings=wings)
    covered = mask_of(rooms, picture.size, scale=2)
    assert (covered > 1).sum() <= 0.002 * max((covered > 0).sum(), 1)


def test_clean_boxes_lie_on_the_inner_faces_of_the_walls() -> None:
    sides = []
    for seed in range(15):
        picture, rooms = draw_plan(seed)
        grey = np.asarray(picture.convert("L")).astype(float)
        for room in rooms:
            x0, y0, x1, y1 = room.bbox_xyxy
            rows = slice(math.ceil(y0) + 1, math.floor(y1) - 1)
            columns = slice(math.ceil(x0) + 1, math.floor(x1) - 1)
            assert np.median(grey[rows, columns]) > 230
            for inner, outer in (
                (grey[rows, math.ceil(x0)], grey[rows, math.floor(x0) - 1]),
                (grey[rows, math.floor(x1) - 1], grey[rows, math.ceil(x1)]),
                (grey[math.ceil(y0), columns], grey[math.floor(y0) - 1, columns]),
                (grey[math.floor(y1) - 1, columns], grey[math.ceil(y1), columns]),
            ):
                sides.append(((inner > 200).mean(), (outer < 60).mean()))
    # A pixel within each side is paper, one beyond it is wall, but for doors, windows and furniture. With
    # boxes 1.5 pixels too large the first falls to 0.14, with boxes 1.5 too small the second to 0.01.
    paper, wall = np.mean(sides, axis=0)
    assert paper > 0.85
    assert wall > 0.6


def test_a_realistic_plan_has_its_walls_where_the_outlines_say() -> None:
    # Averaged over plans, a ring just outside the rooms is much darker than one just inside them.
    inner, outer = [], []
    for seed in range(12):
        picture, rooms = draw_plan(seed, style="realistic", size=500)
        grey = np.asarray(picture.convert("L")).astype(float)
        for room in rooms:
            for distance, values in ((2.0, inner), (-1.5, outer)):
                ring = offset(room.polygon, distance)
                for (ax, ay), (bx, by) in zip(ring, ring[1:] + ring[:1], strict=True):
                    steps = np.linspace(0, 1, max(int(math.hypot(bx - ax, by - ay)), 2))
                    columns = np.clip(ax + steps * (bx - ax), 0, picture.width - 1).astype(int)
                    rows = np.clip(ay + steps * (by - ay), 0, picture.height - 1).astype(int)
                    values.append(grey[rows, columns].mean())
    assert np.mean(inner) - np.mean(outer) > 60


@pytest.mark.parametrize("degrees", [2.0, -1.3])
def test_rotation_takes_the_outlines_along(degrees: float) -> None:
    picture = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(picture).rectangle((40, 30, 119, 89), fill="black")
    turned, (room,) = rotate(picture, [Room(rectangle(40, 30, 120, 90), "Hall")], math.radians(degrees))
    rows, columns = np.nonzero(np.asarray(turned.convert("L")) < 128)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.array(found) - room.bbox_xyxy).max() < 1.0
    assert room.area == pytest.approx(80 * 60)
    assert room.bbox_xyxy[0] != 40


def test_realistic_pages_vary() -> None:
    plans = [draw_plan(seed, style="realistic", size=120) for seed in range(20, 60)]
    counts = [len(rooms) for _, rooms in plans]
    assert 1 <= counts.count(0) <= 10
    assert all(count == 0 or 2 <= count <= 20 for count in counts)
    assert max(counts) >= 12 and len(set(counts)) >= 8
    assert {picture.mode for picture, _ in plans} == {"RGB", "L"}
    outlines = [room.polygon for _, rooms in plans for room in rooms]
    assert any(len(outline) == 6 for outline in outlines), "no L-shaped room"
    assert any(len(outline) > 10 for outline in outlines), "no round room"


def test_wings_make_steps_in_the_outlines_of_homes() -> None:
    def filled(wings: bool) -> list[float]:
        """Of each floor of four rooms and more, the share of its bounding box that its rooms cover."""
        shares = []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            layout, terrace = house_layout(int(rng.integers(4, 14)), rng, wings=wings)
            points = np.array([point for cell in layout.cells for point in cell.outline])
            covered = sum(signed_area(cell.outline) for cell in (*layout.cells, *((terrace,) if terrace else ())))
            shares.append(covered / np.prod(np.ptp(points, axis=0)))
        return shares

    plain, stepped = (np.mean(np.array(filled(wings)) < 0.85) for wings in (False, True))
    assert stepped > plain + 0.25


def test_no_room_of_a_home_with_wings_is_left_without_a_door() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        layout, _ = house_layout(9, rng, wings=True)
        inner, _ = shared_walls(layout.cells)
        joined = {i for pair in inner for i in pair}
        assert joined == set(range(len(layout.cells)))
        assert sum(opening.kind != "window" for opening in layout.openings) >= len(layout.cells) - 1


def test_pages_without_a_plan_are_not_blank() -> None:
    pages = [page_without_plan(200, np.random.default_rng(seed)) for seed in range(9)]
    assert all(np.asarray(page.convert("L")).std() > 10 for page in pages)
    assert len({page.tobytes() for page in pages}) == 9


def test_size_changes_the_scale_only() -> None:
    small, small_rooms = draw_plan(5, size=200)
    large, large_rooms = draw_plan(5, size=400)
    assert (max(small.size), max(large.size)) == (200, 400)
    for a, b in zip(small_rooms, large_rooms, strict=True):
        assert np.allclose(np.array(a.bbox_xyxy) * 2, b.bbox_xyxy, atol=4)


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"seed": 0, "size": 50}, {"seed": 0, "style": "baroque"}], ids=str)
def test_wrong_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        draw_plan(**arguments)  # type: ignore[arg-type]  # wrong types are the point


def test_every_word_can_be_drawn() -> None:
    # Pillow's own font has a box for each letter that it lacks, accents among them.
    words = [word for names in NAMES.values() for variants in names.values() for word in variants]
    words += [word for variants in OUTDOOR_NAMES.values() for word in variants]
    letters = set("".join([*words, *AGENTS, DISCLAIMER, "0123456789.'\"/m x"]))
    missing = bytes(font(24).getmask("\u0fff"))
    assert not [letter for letter in letters if bytes(font(24).getmask(letter)) == missing]


def test_merge_of_neighbours_is_their_union() -> None:
    union = merge(rectangle(0, 0, 4, 3), rectangle(4, 1, 6, 2))
    assert union is not None and len(union) == 8
    assert signed_area(union) == pytest.approx(14)
    assert merge(rectangle(0, 0, 1, 1), rectangle(2, 0, 3, 1)) is None


def test_walls_end_square_at_sharp_corners() -> None:
    sharp = ((0.0, 0.0), (4.0, 0.0), (0.0, 1.0))
    assert signed_area(sharp) > 0
    x0, y0, x1, y1 = Room(offset(sharp, -0.1), "").bbox_xyxy
    assert (x0, y0) == pytest.approx((-0.1, -0.1))
    assert 4.1 <= x1 < 4.2, "the mitre of this corner reaches 4.8"
    assert 1.1 <= y1 < 1.2
    assert offset(rectangle(0, 0, 2, 1), 0.25) == rectangle(0.25, 0.25, 1.75, 0.75)


@pytest.fixture(scope="module", params=["clean", "realistic"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rooms") / request.param
    return write_rooms_dataset(root, num_train=10, num_val=4, style=request.param, size=160)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on NumPy 2
def test_dataset_loads_with_pycocotools(dataset: Path) -> None:
    for split, count in (("train", 10), ("val", 4)):
        coco = load_coco(dataset / split / "annotations.json")
        assert len(coco.imgs) == count
        assert coco.cats == {1: {"id": 1, "name": "room", "supercategory": "plan"}}
        assert len(coco.anns) > count
        on_disk = {path.name for path in (dataset / split / "images").iterdir()}
        assert {image["file_name"] for image in coco.imgs.values()} == on_disk
        for image in coco.imgs.values():
            with Image.open(dataset / split / "images" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
        for annotation in coco.anns.values():
            image = coco.imgs[annotation["image_id"]]
            x, y, w, h = annotation["bbox"]
            assert w > 0 and h > 0 and x >= 0 and y >= 0
            assert x + w <= image["width"] + 1e-6 and y + h <= image["height"] + 1e-6
            points = np.array(annotation["segmentation"][0]).reshape(-1, 2)
            assert np.allclose([x, y, x + w, y + h], [*points.min(0), *points.max(0)])
            assert 0 < annotation["area"] <= w * h + 1e-6
            assert annotation["category_id"] == 1 and annotation["iscrowd"] == 0
            # pycocotools fills the polygon: the same area, up to the pixels along its outline.
            assert coco.annToMask(annotation).sum() == pytest.approx(annotation["area"], abs=2 * (w + h))


def test_train_and_val_share_no_picture(dataset: Path) -> None:
    pictures = [{path.read_bytes() for path in (dataset / split / "images").iterdir()} for split in ("train", "val")]
    assert [len(part) for part in pictures] == [10, 4]
    assert not pictures[0] & pictures[1]


def test_dataset_is_the_same_wherever_it_is_written(tmp_path: Path) -> None:
    def write(name: str, seed: int) -> Path:
        return write_rooms_dataset(tmp_path / name, num_train=4, num_val=2, style="realistic", size=120, seed=seed)

    first, second, other = write("a", 3), write("b/c", 3), write("d", 4)
    assert tree(first) == tree(second)
    shared = set(tree(first).values()) & set(tree(other).values())
    assert not shared


def test_a_dataset_is_reused_until_a_parameter_changes(tmp_path: Path) -> None:
    root = tmp_path / "rooms"
    write_rooms_dataset(root, num_train=2, num_val=1, size=96)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_rooms_dataset(str(root), num_train=2, num_val=1, size=96) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    write_rooms_dataset(root, num_train=3, num_val=1, size=96)
    assert len(list((root / "train" / "images").iterdir())) == 3
    assert json.loads((root / "rooms.json").read_text())["num_train"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["rooms"], "something was left beside the dataset"


def test_an_older_generator_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "rooms"
    write_rooms_dataset(root, num_train=1, num_val=1, size=96)
    before = (root / "train" / "annotations.json").stat().st_mtime_ns
    monkeypatch.setattr("dino_lightning.floor_plans.dataset.GENERATOR_VERSION", 10_000)
    write_rooms_dataset(root, num_train=1, num_val=1, size=96)
    assert (root / "train" / "annotations.json").stat().st_mtime_ns != before


@pytest.mark.parametrize("foreign", ["thesis.tex", "train/annotations.json", "rooms.json"])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, foreign: str) -> None:
    root = tmp_path / "mine"
    (root / foreign).parent.mkdir(parents=True)
    (root / foreign).write_text('{"rooms": 3}')
    with pytest.raises(ValueError, match="not a rooms dataset"):
        write_rooms_dataset(root, num_train=1, num_val=1, size=96)
    assert tree(root) == {foreign: b'{"rooms": 3}'}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_files_added_to_a_dataset_are_not_deleted(tmp_path: Path) -> None:
    root = write_rooms_dataset(tmp_path / "rooms", num_train=1, num_val=1, size=96)
    (root / "notes.txt").write_text("mine")
    write_rooms_dataset(root, num_train=1, num_val=1, size=96)
    with pytest.raises(ValueError, match="not a rooms dataset"):
        write_rooms_dataset(root, num_train=2, num_val=1, size=96)
    assert (root / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    root = tmp_path / "rooms"
    root.mkdir()
    write_rooms_dataset(root, num_train=1, num_val=1, size=96)
    assert (root / "rooms.json").exists()


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_rooms_dataset(tmp_path / "rooms", num_train=1, num_val=1, size=96)
    before = tree(root)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dino_lightning.floor_plans.dataset.draw_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_rooms_dataset(root, num_train=2, num_val=1, size=96)
    assert tree(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["rooms"]


@pytest.mark.parametrize("count", [0, -1])
def test_a_split_needs_pictures(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match="num_val must be"):
        write_rooms_dataset(tmp_path / "rooms", num_val=count)
    assert not list(tmp_path.iterdir())
