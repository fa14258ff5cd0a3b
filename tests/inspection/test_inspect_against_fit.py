"""What the command `inspect` says of a broken dataset, and that training agrees with it."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_lightning.__main__ import run
from dino_lightning.data import CocoDataModule
from dino_lightning.data.findings import KINDS
from dino_lightning.errors import DataError
from dino_lightning.floor_plans import write_rooms_dataset
from tests.data.small_coco import annotation, write_images, write_json
from tests.inspection.shared_folder_faults import FAULTS, write_dataset

NUMBERS = itertools.count()
MAX_PAGE = 10_000_000  # bytes
LONGEST = 2_000  # characters that a sentence may have
SKIPPED = {"image-missing", "image-undecodable"}  # what on_bad_image=skip gets over
LONG_AND_ODD_NAMES = ("file name of 5000 characters", "file name of control characters")

pytestmark = (
    pytest.mark.slow
)  # two minutes; test_health_faults.py goes through another such corpus in the default suite


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return lambda: folder / str(next(NUMBERS))


@pytest.fixture
def inspect(capsys, tmp_path):
    """Run the command; gives its exit code, the JSON or None, and what was printed."""

    def inspect(root: Path, *more: str) -> tuple[int, dict[str, Any] | None, Any]:
        output = root.parent / f"report-{next(NUMBERS)}"
        capsys.readouterr()
        code = run(["inspect", "--data.root", str(root), "--output", str(output), *more])
        printed = capsys.readouterr()
        assert_no_control_characters(printed.out + printed.err.replace("\r", "").replace("\x1b[A", ""))
        assert "Traceback" not in printed.out + printed.err
        if not output.exists():
            assert code == 1
            assert_one_sentence(printed.err.strip().splitlines()[-1])
            return code, None, printed
        page = (output / "health.html").read_bytes()
        assert page.rstrip().endswith(b"</html>") and len(page) < MAX_PAGE
        assert max(len(line) for line in printed.out.replace(str(output), "").splitlines()) <= 100
        report = json.loads((output / "health.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert_adds_up(report)
        errors, warned = report["counts"]["error"], report["counts"]["warning"]
        assert code == int(errors > 0 or ("--strict" in more and warned > 0))
        return code, report, printed

    return inspect


def assert_adds_up(report: dict[str, Any]) -> None:
    counts: Counter[str] = Counter()
    for finding in report["findings"]:
        assert finding["count"] == len(finding["cases"]) > 0
        assert finding["severity"] == KINDS[finding["kind"]].severity
        counts[finding["severity"]] += finding["count"]
    assert {severity: count for severity, count in report["counts"].items() if count} == counts


def assert_no_control_characters(text: str) -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def assert_one_sentence(message: str) -> None:
    assert message and "\n" not in message and len(message) < LONGEST, message[:3000]


def kinds(report: dict[str, Any]) -> set[str]:
    return {finding["kind"] for finding in report["findings"]}


def errors(report: dict[str, Any]) -> set[str]:
    return {kind for kind in kinds(report) if KINDS[kind].severity == "error"}


def refusal(root: Path, on_bad_image: str) -> str:
    """The message with which one pass over the loaders ends, or "" if nothing stands in its way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = CocoDataModule(
                root=str(root), batch_size=2, num_workers=0, image_size=32, max_size=64, on_bad_image=on_bad_image
            )
            for loader in (data.train_dataloader(), data.val_dataloader()):
                for batch in loader:
                    assert batch.images.shape[0] == len(batch.image_ids)
            for index in range(len(data.train_set)):  # an incomplete batch is dropped, another one in each epoch
                data.train_set[index]
    except DataError as error:
        assert str(root) in str(error) and re.search(r"train\.json|val\.json|images/", str(error)), error
        return str(error)
    return ""


def assert_training_agrees(root: Path, report: dict[str, Any]) -> None:
    found = errors(report)
    for on_bad_image, refused in (("error", found), ("skip", found - SKIPPED)):
        message = refusal(root, on_bad_image)
        assert bool(message) == bool(refused), (found, message)
        if message:
            assert_one_sentence(message)


def test_there_are_enough_faults_and_they_name_kinds():
    assert len(FAULTS) >= 45
    assert {kind for _, expected in FAULTS.values() for kind in expected} <= KINDS.keys()


def test_the_dataset_that_is_broken_is_sound(places, inspect):
    root = places()
    write_dataset(root)
    assert inspect(root)[0] == 0
    assert inspect(root, "--strict")[1]["findings"] == []
    assert refusal(root, "error") == refusal(root, "skip") == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_the_command_and_training_agrees(name, places, inspect):
    change, expected = FAULTS[name]
    root = places()
    write_dataset(root)
    change(root)
    _, report, _ = inspect(root)
    assert report is not None
    assert set(expected) <= kinds(report)
    if not expected:
        assert report["findings"] == []
    assert_training_agrees(root, report)


@pytest.mark.parametrize("name", LONG_AND_ODD_NAMES)
def test_a_refusal_repeats_a_file_name_fit_to_print(name, places):
    root = places()
    write_dataset(root)
    FAULTS[name][0](root)
    message = refusal(root, "error")
    assert_one_sentence(message)
    assert_no_control_characters(message)


@settings(
    max_examples=20,
    phases=[Phase.explicit, Phase.generate],  # the names of the faults say enough; shrinking takes minutes
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.sampled_from(list(FAULTS)), min_size=2, max_size=4, unique=True))
def test_faults_together_are_found_by_the_command_and_training_agrees(places, inspect, names):
    root = places()
    write_dataset(root)
    for name in names:
        FAULTS[name][0](root)
    _, report, _ = inspect(root)
    assert report is not None
    assert_training_agrees(root, report)


# --- numbers ---


def spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def counted(annotations: Path, folder: Path) -> dict[str, Any]:
    """The numbers of a file, one box after another."""
    content = json.loads(annotations.read_text())
    of_image: dict[int, list[tuple[float, float]]] = {image["id"]: [] for image in content["images"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    boxes_of_class: Counter[int] = Counter()
    crowd = without_area = clipped = 0
    relative, areas = [], []
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        image_width, image_height = sizes[entry["image_id"]]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, image_width), min(y + height, image_height)
        if right <= left or bottom <= top:
            without_area += 1
            continue
        clipped += (left, top, right, bottom) != (x, y, x + width, y + height)
        if entry.get("iscrowd"):
            crowd += 1
            continue
        boxes_of_class[entry["category_id"]] += 1
        of_image[entry["image_id"]].append((right - left, bottom - top))
        areas.append(entry.get("area", width * height))  # by which COCO's evaluation goes
        relative.append(((right - left) * (bottom - top) / image_width / image_height) ** 0.5)
    boxes = [box for some in of_image.values() for box in some]
    decoded = []
    for image in content["images"]:
        with Image.open(folder / image["file_name"]) as opened:
            opened.load()
            decoded.append(opened.size)
    per_image = [len(some) for some in of_image.values()]
    numbers = {
        "images": len(of_image),
        "images_decoded": len(decoded),
        "images_without_boxes": per_image.count(0),
        "boxes": len(boxes),
        "crowd": crowd,
        "boxes_without_area": without_area,
        "boxes_clipped": clipped,
        "boxes_per_image": spread(per_image),
        "box_width": spread([width for width, _ in boxes]),
        "box_height": spread([height for _, height in boxes]),
        "box_aspect_ratio": spread([width / height for width, height in boxes]),
        "box_relative_size": spread(relative),
        "boxes_small": sum(area <= 32**2 for area in areas),
        "boxes_medium": sum(32**2 <= area <= 96**2 for area in areas),
        "boxes_large": sum(area >= 96**2 for area in areas),
        "image_width": spread([width for width, _ in decoded]),
        "image_height": spread([height for _, height in decoded]),
        "image_aspect_ratio": spread([width / height for width, height in decoded]),
        "boxes_per_image_histogram": {str(number): count for number, count in sorted(Counter(per_image).items())},
    }
    return {"numbers": numbers, "classes": boxes_of_class}


def assert_numbers_equal_a_count(report: dict[str, Any], splits: dict[str, tuple[Path, Path]]) -> None:
    assert report["splits"].keys() == splits.keys()
    for name, (path, folder) in splits.items():
        expected = counted(path, folder)
        for key, value in expected["numbers"].items():
            found = report["splits"][name][key]
            assert found == (pytest.approx(value) if key.startswith(("box_", "image_")) and value else value), key
        for row in report["classes"]:
            assert row["boxes"][name] == expected["classes"][row["category_id"]]


def test_numbers_of_plans_equal_a_count(tmp_path, inspect):
    root = write_rooms_dataset(tmp_path / "plans", num_train=7, num_val=4, size=200)
    _, report, _ = inspect(root)
    splits = {
        name: (Path(numbers["annotations"]), Path(numbers["image_folder"]))
        for name, numbers in report["splits"].items()
    }
    assert set(splits) == {"train", "val"}
    assert_numbers_equal_a_count(report, splits)


def test_numbers_of_a_dataset_by_hand_equal_a_count(tmp_path, inspect):
    root = tmp_path / "made"
    train = {
        "images": [
            {"id": 5, "file_name": "a/big.png", "width": 320, "height": 200},
            {"id": 3, "file_name": "b.png", "width": 31, "height": 47},
            {"id": 9, "file_name": "empty.png", "width": 20, "height": 20},
        ],
        "annotations": [
            annotation(1, 5, 4, [0, 0, 96, 96]),  # exactly where large begins: counted twice
            annotation(2, 5, 4, [10, 10, 32, 32]),  # exactly where medium begins: counted twice
            annotation(3, 3, 2, [1.5, 2.25, 7.5, 9.125]),
            annotation(4, 5, 2, [300, 150, 60, 60]),  # sticks out on two sides
            annotation(5, 3, 2, [-4, -4, 20, 20], iscrowd=1),  # a crowd that sticks out
            annotation(6, 3, 4, [5, 5, -3, 4]),
            annotation(7, 3, 4, [5, 5, 3, 4], iscrowd=1),
            annotation(8, 9, 4, [20, 0, 3, 4]),  # just outside
        ],
        "categories": [{"id": 4, "name": "hall"}, {"id": 2, "name": "stairs"}],
    }
    val = {
        "images": [{"id": 1, "file_name": "c.png", "width": 64, "height": 64}],
        "annotations": [annotation(1, 1, 2, [0, 0, 10, 40], area=7)],
        "categories": train["categories"],
    }
    for name, content in (("train", train), ("val", val)):
        write_json(root / f"{name}.json", content)
        write_images(root / "images", content)
    _, report, _ = inspect(root)
    assert_numbers_equal_a_count(report, {name: (root / f"{name}.json", root / "images") for name in ("train", "val")})
    numbers = report["splits"]["train"]
    named = ("boxes", "crowd", "boxes_without_area", "boxes_clipped", "boxes_small", "boxes_medium", "boxes_large")
    assert [numbers[key] for key in named] == [4, 2, 2, 2, 2, 3, 1]


# --- the command ---


def test_strict_is_about_warnings_not_notes(places, inspect):
    noted, warned = places(), places()
    for root, fault in ((noted, "grey"), (warned, "bbox sticks out")):
        write_dataset(root)
        FAULTS[fault][0](root)
    assert inspect(noted, "--strict")[0] == 0
    assert inspect(warned)[0] == 0
    assert inspect(warned, "--strict")[0] == 1


def test_options_and_folders_that_do_not_exist(places, capsys):
    assert run(["inspect", "--data.root", str(places()), "--nonsense", "3"]) == 2
    assert_one_sentence(capsys.readouterr().err.strip())
    assert run(["inspect", "--data.root", str(places())]) == 1
    assert_one_sentence(capsys.readouterr().err.strip())


@pytest.mark.parametrize(
    "output", ["/proc/here", "/dev/null", "x" * 300, "plans/train.json", "plans/train.json/deeper"]
)
def test_an_output_that_cannot_be_written_is_one_sentence(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "plans")
    before = sorted(tmp_path.rglob("*"))
    assert run(["inspect", "--data.root", "plans", "--output", output]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and output in lines[0]
    assert_one_sentence(lines[0])
    assert sorted(tmp_path.rglob("*")) == before


def test_hostile_names_are_text_everywhere(places, inspect):
    root = places()
    write_dataset(root)
    script = "<script>alert(1)</script>.png"  # a folder with a file, for the slash
    quotes = "\"'`onerror=alert(1) {{ 7*7 }} {% raw %} &lt; \u202egnp.png"
    styled = "</style><img src=//evil.example/a.png>"
    path = root / "train.json"
    content = json.loads(path.read_text())
    (root / "images" / script).parent.mkdir()
    for index, name in ((0, script), (1, quotes)):
        (root / "images" / content["images"][index]["file_name"]).rename(root / "images" / name)
        content["images"][index]["file_name"] = name
        content["annotations"][2 * index]["bbox"] = [-5, 0, 70, 30]
    content["categories"] = [{"id": 1, "name": styled}, {"id": 2, "name": "{{ 7*7 }}{{ config }}\x1b[31m\u0007"}]
    write_json(path, content)
    _, report, _ = inspect(root)  # looks at what the terminal gets
    assert [row["name"] for row in report["classes"]] == [category["name"] for category in content["categories"]]
    report_folder = max(root.parent.glob("report-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    page = (report_folder / "health.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    assert "<script" not in page.lower() and page.lower().count("</style") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.png" in page
    assert "{{ 7*7 }}" in page and "{% raw %}" in page and "&amp;lt;" in page  # nothing was computed or unescaped
    assert "\x1b" not in page and "\u202e" not in page
    for attribute in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]{0,30})""", re.sub(r"&[a-z]+;.*?(?=<)", "", page)):
        assert attribute.startswith("data:image/"), attribute
    tags = re.findall(r"<(?:\"[^\"]*\"|'[^']*'|[^>\"'])*>", page)
    assert not any(re.search(r"\son\w+\s*=", re.sub(r"\"[^\"]*\"", '""', tag)) for tag in tags)
