"""The report's files: numbers that agree with the metric, strict JSON, a page that needs nothing but itself."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dino_lightning.errors import DataError
from dino_lightning.report import find_report, load_report, write_report
from dino_lightning.report.compare import compare
from dino_lightning.report.errors import ERROR_KINDS, FALSE_KINDS
from dino_lightning.report.pictures import choose
from tests.report.evaluations import evaluate, write_images

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}$x^2$\x1b[2J"
ONE, THREE = ["room"], ["door", "window", "never"]
EIGHTY = [f"class {number}" for number in range(78)] + [HOSTILE, "never"]


def strict(text):
    """JSON without NaN and the like."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def report(tmp_path):
    """Writes a report of made-up detections; gives its folder, its numbers and the evaluation."""

    def write(class_names, *, against=None, name="report", stage="validate", num_images=8, boxes=6, **how):
        folder = write_images(tmp_path / f"images{len(class_names)}", class_names, num_images=num_images, boxes=boxes)
        evaluation, source = evaluate(folder, stage=stage, **how)
        threshold = max(evaluation.values["F1_threshold"], 0.0)
        write_report(evaluation, source, tmp_path / name, threshold=threshold, against=against)
        return tmp_path / name, strict((tmp_path / name / "report.json").read_text()), evaluation

    return write


@pytest.mark.parametrize("class_names", [ONE, THREE, EIGHTY], ids=["one", "three", "eighty"])
def test_numbers_agree_with_the_metric(report, class_names):
    folder, summary, evaluation = report(class_names, num_images=20, boxes=12, spread=0.15)

    def measured(value):
        return None if value == -1 else pytest.approx(value, abs=1e-6)

    for name, value in summary["values"].items():
        assert value == measured(evaluation.values[name]), name
    assert summary["at_threshold"]["f1"] == measured(evaluation.values["F1"])
    assert summary["at_threshold"]["precision"] == measured(evaluation.values["F1_precision"])
    assert summary["at_threshold"]["recall"] == measured(evaluation.values["F1_recall"])
    for size in ("small", "medium", "large"):
        row = next(row for row in summary["sizes"] if row["name"] == size)
        assert row["AP"] == measured(evaluation.values[f"AP_{size}"])
    curve = summary["curves"]["precision_at_recall"]["0.50"]
    assert np.mean(curve) == pytest.approx(evaluation.values["AP50"], abs=1e-4)
    at = summary["curves"]["at_threshold"]["f1"]
    assert max(at) <= evaluation.values["F1"] + 1e-4
    for row, one in zip(summary["classes"], evaluation.classes, strict=True):
        assert (row["label"], row["name"], row["num_boxes"]) == (one.label, one.name, one.num_boxes)
        assert row["category_id"] == one.label + 10
        assert row["AP"] == measured(one.ap)
        assert row["best_f1"] == measured(one.f1)
        assert row["correct"] + row["missed"] == row["num_boxes"]

    errors = {row["kind"]: row["count"] for row in summary["errors"]}
    for kind, count in errors.items():
        assert count == sum(row[kind] for row in summary["classes"]) == sum(row[kind] for row in summary["images"])
    assert sum(summary["missed_because"].values()) == errors["missed"]
    assert all(count > 0 for count in errors.values())
    matrix = {(entry["true"], entry["predicted"]): entry["count"] for entry in summary["confusion"]}
    for row in summary["classes"]:
        label = row["label"]
        assert sum(count for (true, _), count in matrix.items() if true == label) == row["num_boxes"]
        detected = sum(count for (_, predicted), count in matrix.items() if predicted == label)
        assert detected == row["correct"] + sum(row[kind] for kind in FALSE_KINDS)
        assert matrix.get((label, label), 0) == row["correct"]

    off = [row["counted"] - row["true"] for row in summary["images"]]
    assert summary["counts"]["mean_absolute_error"] == pytest.approx(np.abs(off).mean(), abs=1e-6)
    assert summary["counts"]["exact"] == pytest.approx(np.mean(np.array(off) == 0), abs=1e-6)
    assert sum(row["count"] for row in summary["calibration"]["bins"]) <= summary["num_detections"]

    with (folder / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == class_names
    assert [row["AP"] for row in rows] == ["" if row["AP"] is None else str(row["AP"]) for row in summary["classes"]]
    with (folder / "per_image.csv").open(newline="") as file:
        assert [int(row["missed"]) for row in csv.DictReader(file)] == [row["missed"] for row in summary["images"]]


@pytest.mark.parametrize("class_names", [ONE, EIGHTY], ids=["one", "eighty"])
def test_the_page_needs_nothing_but_itself(report, class_names):
    folder, summary, _ = report(class_names, num_images=40, boxes=12, spread=0.15)
    content = (folder / "index.html").read_text()
    assert len(content) < 10_000_000
    page = Page(content)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:image/", "#")), (tag, value[:80])
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", re.sub(r"base64,[\w+/=]+", "", content))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "".join(page.texts).count("Validation report") == 2
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(attributes["alt"] for attributes in images)
    pictures = [attributes for attributes in images if attributes["src"].startswith("data:image/jpeg")]
    assert 30 <= len(pictures) <= 54
    for attributes in pictures:
        decoded = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
        assert decoded.size == (320, 200)
    shots = [attributes for tag, attributes in page.tags if (tag, attributes.get("class")) == ("figure", "shot")]
    assert len(shots) == len(pictures)
    drawn = {attributes["data-k"] for tag, attributes in page.tags if tag == "rect" and "data-k" in attributes}
    assert {"found", "correct"} | {row["kind"] for row in summary["errors"]} <= drawn
    if class_names is EIGHTY:
        assert "alert(1)" in "".join(page.texts)
        svg = [a["src"] for tag, a in page.tags if tag == "img" and a["src"].startswith("data:image/svg")]
        assert len(svg) == 8
        assert all(b"<script" not in base64.b64decode(source.partition(",")[2]) for source in svg)


@pytest.mark.parametrize(
    ("images", "boxes", "how"),
    [
        (1, 0, {"strays": 0}),  # nothing to find, nothing found
        (2, 0, {"strays": 5}),  # nothing to find
        (3, 3, {"missed": 1.0, "strays": 0}),  # nothing found
        (4, 3, {"missed": 1.0, "confused": 0, "strays": 6}),  # nothing correct
        (2, 400, {}),  # more than are drawn
    ],
)
@pytest.mark.parametrize("class_names", [ONE, THREE], ids=["one", "three"])
def test_odd_evaluations(report, class_names, images, boxes, how):
    folder, summary, _ = report(class_names, num_images=images, boxes=boxes, **how)
    assert summary["num_images"] == images
    page = Page((folder / "index.html").read_text())
    assert sum((tag, a.get("class")) == ("figure", "shot") for tag, a in page.tags) == images
    if boxes == 0:
        assert summary["values"]["AP"] is None
        assert summary["at_threshold"]["recall"] is None
    # and each can be compared with itself
    again, _, _ = report(
        class_names,
        num_images=images,
        boxes=boxes,
        name="again",
        against=("a", load_report(folder / "report.json")),
        **how,
    )
    assert "Compared with a" in (again / "index.html").read_text()


def test_an_image_that_is_gone_leaves_its_boxes(report, tmp_path):
    folder = write_images(tmp_path / "images", ONE, num_images=3)
    evaluation, source = evaluate(folder)
    (folder / "001.png").unlink()
    write_report(evaluation, source, tmp_path / "report", threshold=0.5)
    content = (tmp_path / "report/index.html").read_text()
    assert "001.png (image 2), which cannot be read" in content
    assert content.count("data:image/jpeg") == 2


def test_file_names_that_are_no_text(tmp_path):
    names = ["<b>&\"'.png", "$a$ é 図.png"]
    folder = write_images(tmp_path / "images", ["図面", "$x$"], num_images=2, names=names)
    evaluation, source = evaluate(folder)
    write_report(evaluation, source, tmp_path / "report", threshold=0.5)
    page = Page((tmp_path / "report/index.html").read_text())
    assert "<b>&\"'.png (image 1)" in "".join(page.texts)
    assert "図面" in "".join(page.texts)


def test_which_images_are_shown():
    def row(number, f1, true=3, **errors):
        return {"image_id": number, "f1": f1, "true": true, **dict.fromkeys(ERROR_KINDS, 0), **errors}

    rows = [row(number, number / 100) for number in range(100)]
    chosen, others = choose(rows)
    ids = {group: [one["image_id"] for name, one in chosen if name == group] for group in ("worst", "median", "best")}
    assert ids == {"worst": [*range(12)], "median": [*range(47, 53)], "best": [*range(99, 87, -1)]}
    assert len(others) == 70
    for count in range(1, 40):
        chosen, others = choose(rows[:count])
        shown = [one["image_id"] for _, one in chosen] + [one["image_id"] for one in others]
        assert sorted(shown) == [*range(count)]
        assert chosen[0][0] == "worst"
    equal = [
        row(1, 0.5, missed=1),
        row(2, 0.5, missed=2),
        row(3, 1.0, true=0),
        row(4, 1.0, true=9),
        row(5, 1.0, true=5),
    ]
    chosen, _ = choose(equal)
    assert [one["image_id"] for _, one in chosen] == [2, 1, 3, 4, 5]


def test_against_another_run(report):
    before, _, _ = report(THREE, name="runs/a/validate/report", spread=0.25)
    other = load_report(find_report(before.parents[1], "validate"))
    after, summary, _ = report(THREE, name="b", spread=0.02, seed=1, against=("runs/a", other))
    assert find_report(before, "validate") == find_report(before / "report.json", "test") == before / "report.json"
    page = Page((after / "index.html").read_text())
    text = " ".join(" ".join(page.texts).split())
    assert "Compared with runs/a" in text
    change = summary["values"]["AP"] - other["values"]["AP"]
    assert change > 0.1
    assert f"AP {other['values']['AP']:.3f} {summary['values']['AP']:.3f} {change:+.3f}" in text
    assert "Of 8 images in both" in text
    assert "not evaluated on the same images" not in text
    better = sum(a["f1"] > b["f1"] for a, b in zip(summary["images"], other["images"], strict=True))
    assert f"{better} became better" in text


def test_against_a_run_on_other_images_and_classes(report, tmp_path):
    before, _, _ = report(ONE, name="a", num_images=3)
    other = load_report(before / "report.json")
    after, _, _ = report(["room", HOSTILE, "never"], name="b", against=("a", other))
    text = " ".join(" ".join(Page((after / "index.html").read_text()).texts).split())
    assert "not evaluated on the same images: 8 here, 3 there, 3 in common" in text
    assert "Only in this run: <script>alert(1)" in text


def as_schema_1(summary):
    """The report as written before the error kinds had TIDE's names; `both` was counted as background."""
    old = {"correct": "right", "classification": "wrong_class", "localization": "wrong_place"}

    def renamed(row):
        row = {old.get(key, key): value for key, value in row.items() if key != "both"} | (
            {"background": row["background"] + row["both"]} if "both" in row else {}
        )
        return row | {"kind": old.get(row["kind"], row["kind"])} if "kind" in row else row

    both = sum(row["count"] for row in summary["errors"] if row["kind"] == "both")
    errors = [renamed(row) for row in summary["errors"] if row["kind"] != "both"]
    errors[-1]["count"] += both
    return summary | {
        "schema": 1,
        "at_threshold": renamed(summary["at_threshold"]),
        "classes": [renamed(row) for row in summary["classes"]],
        "images": [renamed(row) for row in summary["images"]],
        "missed_because": renamed(summary["missed_because"]),
        "calibration": summary["calibration"] | {"bins": [renamed(row) for row in summary["calibration"]["bins"]]},
        "errors": errors,
    }


@pytest.mark.parametrize("class_names", [ONE, THREE], ids=["one", "three"])
def test_against_a_report_written_before_the_kinds_were_renamed(report, class_names):
    before, written, _ = report(class_names, name="a", num_images=20, boxes=12, spread=0.25)
    old = as_schema_1(written)
    assert "wrong_place" in {row["kind"] for row in old["errors"]} & old["images"][1].keys() & old["classes"][0].keys()
    (before / "report.json").write_text(json.dumps(old))
    other = load_report(before / "report.json")
    after, this, _ = report(class_names, name="b", num_images=20, boxes=12, spread=0.1, against=("a", other))

    now = {row["kind"]: row["count"] for row in written["errors"]}
    found = compare(this, other, "a")
    rows = {row["name"]: row for row in found["errors"]}
    for kind in ("missed", "duplicate", "localization", *(["classification"] if class_names is THREE else [])):
        assert rows[kind]["other"] == now[kind]
        assert rows[kind]["change"] == rows[kind]["this"] - now[kind]
    text = " ".join(" ".join(Page((after / "index.html").read_text()).texts).split())
    if class_names is ONE:
        assert rows["background"]["other"] == now["background"]
        assert "earlier version" not in text
    else:  # some of the background there would be `both` here
        assert rows["both"]["other"] is None
        assert rows["background"]["other"] == now["background"] + now["both"] > now["background"]
        assert rows["background"]["change"] is rows["background"]["improved"] is None
        assert "counted detections near a box of another class (both) as background" in text
    assert other["images"][1]["localization"] == written["images"][1]["localization"]
    assert other["at_threshold"] == written["at_threshold"]
    assert other["missed_because"] == written["missed_because"]
    assert other["calibration"] == written["calibration"]


def test_kinds_that_need_two_classes_are_not_listed_for_one(report):
    _, one, _ = report(ONE)
    assert [row["kind"] for row in one["errors"]] == ["missed", "duplicate", "localization", "background"]
    _, three, _ = report(THREE)
    assert [row["kind"] for row in three["errors"]] == [*ERROR_KINDS]


BROKEN = {
    "no json": ("{", "is not a JSON file"),
    "a list": ("[]", "is not the report.json of an evaluation"),
    "something else": ('{"kind": "cake"}', "is not the report.json of an evaluation"),
    "another version": ('{"kind": "dino_lightning evaluation", "schema": 99}', "schema 99, this version reads 1 and 2"),
    "half a report": ('{"kind": "dino_lightning evaluation", "schema": 2}', "is damaged (KeyError: 'values')"),
    "half an old report": (
        '{"kind": "dino_lightning evaluation", "schema": 1}',
        "is damaged (KeyError: 'at_threshold')",
    ),
    "deep": ("[" * 100_000, "is not a JSON file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_report_that_cannot_be_compared_with(case, tmp_path):
    content, message = BROKEN[case]
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_report(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("where", [("values", "AP"), ("classes", 0, "AP"), ("images", 0, "f1"), ("errors", 0, "kind")])
@pytest.mark.parametrize("value", ["<b>", [1], {"a": 1}])
def test_a_report_with_something_else_in_the_place_of_a_number(report, where, value, tmp_path):
    folder, summary, _ = report(ONE, num_images=2)
    *path, last = where
    place = summary
    for key in path:
        place = place[key]
    place[last] = value
    (folder / "report.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="is damaged"):
        load_report(folder / "report.json")


def test_no_report_where_one_is_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no report\.json in it or in test/report"):
        find_report(tmp_path / "nowhere", "test")


def test_more_boxes_than_coco_looks_at_are_told_of(report):
    folder, content, _ = report(ONE, num_images=2, boxes=120)
    assert content["crowded_images"] == 1
    assert "1 image has more than 100 ground-truth boxes of one class" in (folder / "index.html").read_text()


def test_a_class_may_be_called_like_an_error(report):
    _, other, _ = report(["missed", "background", "never"], missed=0.5)
    _, this, _ = report(["missed", "background", "never"], name="again", missed=0.1)
    found = compare(this, other, "other")
    rows = [row for row in found["classes"] if row["change"]]
    assert rows and all(row["improved"] == (row["change"] > 0) for row in rows)
    rows = [row for row in found["errors"] if row["change"]]
    assert rows and all(row["improved"] == (row["change"] < 0) for row in rows)


def test_changed_annotations_are_told_of(report):
    _, this, _ = report(ONE)
    assert compare(this, this, "other")["notes"] == []
    other = json.loads(json.dumps(this))
    other["images"][1]["true"] += 1
    (note,) = compare(this, other, "other")["notes"]
    assert note.startswith("1 of the 8 common images have another number of ground-truth boxes")
