"""What a health report says and shows of each class."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_lightning.data.splits import resolve_split_files
from dino_lightning.inspection import class_samples as samples_module
from dino_lightning.inspection.class_samples import class_samples
from dino_lightning.inspection.inspect import inspect_dataset
from dino_lightning.inspection.page import CLASSES_OPEN, as_html
from dino_lightning.inspection.text import as_json, as_text
from tests.data.small_coco import annotation, write_json
from tests.inspection.faults import FAULTS, break_dataset

GREY, SIDE = 128, 200


def inspected(root: Path):
    return inspect_dataset(resolve_split_files(root, dict.fromkeys(("train", "val", "test"), (None, None))))


def write(root: Path, boxes: dict[str, list[list[list[float]]]], size: int = SIDE) -> None:
    """Grey pages to train on: for each class by name the boxes in each image; and one page to validate on."""
    count = max(map(len, boxes.values()))
    for split, first, number in (("train", 1, count), ("val", 101, 1)):
        images, annotations = [], []
        for k in range(number):
            name = f"{first + k}.png"
            (root / split / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((size, size, 3), GREY, np.uint8)).save(root / split / "images" / name)
            images.append({"id": first + k, "file_name": name, "width": size, "height": size})
        for category_id, of_images in enumerate(boxes.values(), start=1):
            for k, of_image in enumerate(of_images[:number]):
                for box in of_image:
                    annotations.append(annotation(len(annotations) + 1, first + k, category_id, box))
        categories = [{"id": k, "name": name} for k, name in enumerate(boxes, start=1)]
        write_json(
            root / split / "annotations.json", {"images": images, "annotations": annotations, "categories": categories}
        )


def sections(page: str) -> list[tuple[str, bool, list[np.ndarray]]]:
    """Of each class on the page: its summary as text, whether it is open, and its pictures as (H, W, 3)."""
    found = []
    for opened, summary, rest in re.findall(
        r'<details class="class"( open)?>\s*<summary>(.*?)</summary>(.*?)</details>', page, re.DOTALL
    ):
        pictures = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")).astype(int)
            for code in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', rest)
        ]
        found.append((html.unescape(re.sub("<[^>]+>", "", summary)), bool(opened), pictures))
    return found


def is_red(pixel: np.ndarray) -> bool:
    return bool(pixel[0] > pixel[1:].max() + 60)


def test_the_page_opens_with_the_boxes_of_each_class_drawn_over_those_of_others(tmp_path):
    hall, stairs = [20.0, 30.0, 60.0, 50.0], [120.0, 110.0, 50.0, 40.0]
    write(tmp_path, {"stairs": [[stairs]], "hall": [[hall], [hall]]})
    page = as_html(inspected(tmp_path), "plans")
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings[:2] == ["What each class looks like", "Findings"]
    (first, _, of_hall), (second, _, of_stairs) = sections(page)
    assert first.startswith("hall category 2: 3 boxes in 3 images; median 60 \u00d7 50 px, 7.5 % of the image")
    assert second.startswith("stairs category 1: 2 boxes in 2 images")
    assert [len(of_hall), len(of_stairs)] == [3, 2]
    for pictures, own, other in ((of_hall, hall, stairs), (of_stairs[:1], stairs, hall)):
        for picture in pictures:
            assert picture.shape == (SIDE, SIDE, 3)
            x, y, width, height = map(int, own)
            assert is_red(picture[y, x + width // 2]) and is_red(picture[y + height // 2, x])
            assert not is_red(picture[int(other[1]), int(other[0] + other[2] / 2)])
    both = of_stairs[0]
    page_around, edge = both[180, 20], both[30, 50]  # the hall is there too, but pale
    assert 5 < np.abs(edge - page_around).max() < 110


def test_tiny_boxes_are_shown_with_a_part_of_the_image(tmp_path):
    write(tmp_path, {"socket": [[[1000.0, 1200.0, 12.0, 12.0]]]}, size=1600)
    page = as_html(inspected(tmp_path), "plans")
    ((_, _, pictures),) = sections(page)
    assert "1 box, a part" in page
    red = np.argwhere(pictures[0][..., 0] > pictures[0][..., 1] + 60)
    assert (np.ptp(red, axis=0) >= 24).all()  # 2.4 pixels if the whole image were shown


@pytest.mark.parametrize("size", [(60_000, 50), (50, 60_000), (20, 20)])
def test_samples_are_drawn_where_the_size_in_the_annotations_is_wrong(tmp_path, size):
    write(tmp_path, {"socket": [[[10.0, 12.0, 6.0, 6.0]]]})
    path = tmp_path / "train/annotations.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"width": size[0], "height": size[1]}
    write_json(path, content)
    ((_, _, pictures),) = sections(as_html(inspected(tmp_path), "plans"))
    assert len(pictures) == 2


def test_at_most_twelve_samples_and_twelve_open_classes_biggest_first(tmp_path):
    boxes = {f"class {k}": [[[5.0 + 3 * k, 40.0, 20.0 + k, 40.0]]] * (20 - k) for k in range(16)}
    write(tmp_path, boxes)
    found = sections(as_html(inspected(tmp_path), "plans"))
    assert [summary.partition(" category")[0] for summary, _, _ in found] == list(boxes)
    assert [opened for _, opened, _ in found] == [True] * CLASSES_OPEN + [False] * (16 - CLASSES_OPEN)
    assert [len(pictures) for _, _, pictures in found] == [min(12, 21 - k) for k in range(16)]


def test_samples_stay_within_their_budget_and_every_class_has_one(tmp_path, monkeypatch):
    write(tmp_path, {f"class {k}": [[[5.0 + 3 * k, 40.0, 20.0 + k, 40.0]]] * 12 for k in range(5)})
    report = inspected(tmp_path)
    size = len(class_samples(report)[0].pictures[0].source)
    monkeypatch.setattr(samples_module, "SAMPLE_BYTES", 14 * size)
    samples = class_samples(report)
    assert {len(sample.pictures) for sample in samples} <= {2, 3}
    assert all(len(sample.pictures) + sample.left_out == 12 for sample in samples)
    page = as_html(report, "plans")
    assert f"{sum(sample.left_out for sample in samples)} further images were left out to keep this page small" in page
    monkeypatch.setattr(samples_module, "MOST_SAMPLES", 3)
    assert [len(sample.pictures) for sample in class_samples(report)] == [1, 1, 1, 0, 0]


def test_the_class_table_says_how_boxes_look(tmp_path):
    write(tmp_path, {"wall": [[[10.0, 10.0, 4.0, 100.0]], [[10.0, 10.0, 100.0, 4.0]]], "unused": []})
    report = inspected(tmp_path)
    rows = as_json(report)["classes"]
    assert rows[0]["median_width"] == 4 and rows[0]["median_height"] == 100  # twice high, once wide
    assert rows[0]["median_aspect_ratio"] == pytest.approx(0.04) and rows[0]["median_elongation"] == 25
    assert rows[0]["median_percent_of_image"] == pytest.approx(100 * 400 / SIDE**2)
    assert {value for key, value in rows[1].items() if key.startswith("median")} == {None}
    lines = [re.split(r"\s{2,}", line) for line in as_text(report).splitlines()]
    assert ["1", "0", "wall", "2", "1", "4", "100", "0.04", "25", "1"] in lines
    assert ["2", "1", "unused", "0", "0", "-", "-", "-", "-", "-"] in lines


def slivers(walls: int, rooms: int) -> dict[str, list[list[list[float]]]]:
    wall = [[10.0 + 3 * k, 10.0, 3.0, 30.0 + k] if k % 2 else [10.0, 10.0 + 3 * k, 30.0 + k, 3.0] for k in range(walls)]
    return {"room": [[*wall, *([50.0 + 3 * k, 60.0, 30.0, 40.0 + k] for k in range(rooms))]]}


@pytest.mark.parametrize(("walls", "rooms", "found"), [(19, 0, False), (20, 0, True), (36, 4, True), (35, 5, False)])
def test_a_class_of_slivers_is_a_warning_beside_its_samples(tmp_path, walls, rooms, found):
    write(tmp_path, slivers(walls, rooms))
    report = inspected(tmp_path)
    cases = {(finding.kind, finding.split): finding.cases for finding in report.findings}
    assert (("class-slivers", "train") in cases) == found
    if found:
        (case,) = cases["class-slivers", "train"]
        start = f"room (category 1): {walls} of {walls + rooms} boxes are 8 times as long as wide or more; median 3 x "
        assert case.detail.startswith(start)
        section = as_html(report, "plans").partition("<h2>Findings")[0]
        assert f"train: {walls} of {walls + rooms} boxes are 8 times" in section


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([[k * 9.0, k * 5.0, 24.0, 30.0 + 0.2 * (k % 2)] for k in range(20)], "20 boxes in 5 images are 24 x 30.1 px"),
        ([[k * 9.0, k * 5.0, 24.0, 30.0 + 2 * (k % 2)] for k in range(20)], ""),
        ([[k * 9.0, k * 5.0, 24.0, 30.0] for k in range(19)], ""),
        ([[40.0, 50.0, 24.0 + 0.3 * (k % 2), 30.0 + 0.01 * k] for k in range(20)], "from 20 to 32.1 % of the width"),
    ],
)
def test_boxes_that_are_all_the_same_are_a_warning(tmp_path, boxes, words):
    write(tmp_path, {"desk": [boxes[start::5] for start in range(5)]})
    details = [
        case.detail for finding in inspected(tmp_path).findings for case in finding.cases if "(cat" in case.detail
    ]
    assert len(details) == bool(words)
    assert words in "".join(details)


def test_boxes_all_the_same_in_few_images_may_be_meant(tmp_path):
    boxes = [[k * 9.0, k * 5.0, 24.0, 30.0] for k in range(20)]
    write(tmp_path, {"desk": [boxes[start::4] for start in range(4)]})
    assert "class-all-the-same" not in {finding.kind for finding in inspected(tmp_path).findings}


def test_findings_are_counted_apart_from_their_cases(tmp_path):
    break_dataset(tmp_path, FAULTS["image grey"])
    for name in ("2", "3"):
        (tmp_path / "train/images" / f"more{name}.png").write_bytes((tmp_path / "train/images/4.png").read_bytes())
    report = inspected(tmp_path)
    assert "Findings: 0 errors, 0 warnings, 2 notes (3 cases)" in as_text(report)
    numbers = json.loads(json.dumps(as_json(report)))
    assert numbers["counts"]["note"] == 3 and numbers["findings_by_severity"]["note"] == 2
    assert re.search(r"<b>2</b> notes <small>\(3 cases\)</small>", as_html(report, "plans"))


@pytest.mark.parametrize("name", ["width missing", "file name upwards", "height zero", "image id twice"])
def test_a_file_of_a_refused_entry_is_listed_all_the_same(tmp_path, name):
    break_dataset(tmp_path, FAULTS[name])
    not_listed = {
        case.file_name
        for finding in inspected(tmp_path).findings
        if finding.kind == "not-listed"
        for case in finding.cases
    }
    # the entry of 4.png has another name now
    assert not_listed == ({"4.png"} if name == "file name upwards" else set())


def test_sizes_are_counted_by_the_area_of_the_annotation_limits_included(tmp_path):
    write(tmp_path, {"hall": [[[0.0, 0.0, side, side] for side in (32.0, 96.0, 224.0, 33.0, 31.0)]]}, size=256)
    path = tmp_path / "train/annotations.json"
    content = json.loads(path.read_text())
    for entry, area in zip(content["annotations"], (32**2, 96**2, 50_000, 1025, None), strict=True):
        entry |= {"area": area}
    write_json(path, content)
    numbers = as_json(inspected(tmp_path))["splits"]["train"]
    assert [numbers[f"boxes_{size}"] for size in ("small", "medium", "large")] == [2, 3, 2]
    assert "by the area of the annotation, as evaluation counts them" in " ".join(as_text(inspected(tmp_path)).split())
