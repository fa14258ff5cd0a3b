"""Names in CSV files, which spreadsheets may take for formulas."""

import csv
import json
import re
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning.detections import Detections
from dino_lightning.files import csv_cell
from dino_lightning.inference.image_list import ListedImage, Stamp
from dino_lightning.inference.results import Records, record, write_results
from dino_lightning.report.tables import as_csv

FILES = ["=HYPERLINK(1).png", "'=already.png", "-1.png", "plan.png", "'quoted'.png", "\tcell.png", "a=b.png"]
SPECIAL = r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"
CLASSES = ["@SUM(A1)", "+1", "room", "\uff1d1"]


def test_no_cell_of_the_predictions_is_a_formula_and_names_come_back(tmp_path):
    images = [ListedImage(Path(name), name, 7 + number, Stamp(name)) for number, name in enumerate(FILES)]
    boxes = torch.tensor([[-5.0, 1.0, 20.0, 30.0]] * len(CLASSES))
    found = Detections(boxes, torch.full((4,), 0.5), torch.arange(4), tuple(CLASSES), (1, 2, 3, 4))
    lines = Records(folder=tmp_path, process=0)
    for image in images:
        lines.add(record(image, (40, 50), found))
    lines.close()
    write_results(tmp_path, images, dict(enumerate(CLASSES, 1)))

    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    text = [header.index("file"), header.index("name")]
    assert len(rows) == len(FILES) * len(CLASSES)
    assert not [row for row in rows for column in text if re.match(SPECIAL, row[column])]
    assert {row[header.index("x1")] for row in rows} == {"-5.0"}  # a number stays one

    entries = json.loads((tmp_path / "images.json").read_text())
    by_id = {entry["id"]: entry["file_name"] for entry in entries["images"]}
    names = {entry["id"]: entry["name"] for entry in entries["categories"]}
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        assert as_it_was(cells["file"]) == by_id[int(cells["image_id"])]
        assert as_it_was(cells["name"]) == names[int(cells["category_id"])]
    assert [row[text[0]] for row in rows[:: len(CLASSES)]] == [
        "'=HYPERLINK(1).png", "''=already.png", "'-1.png", "plan.png", "'quoted'.png", "'\tcell.png", "a=b.png",
    ]  # fmt: skip
    assert json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])["file"] == FILES[0]


def test_no_cell_of_a_report_is_a_formula():
    rows = [{"file": "=1+1.png", "off": -3}, {"file": "plan.png", "off": None}]
    assert as_csv(rows) == "file,off\n'=1+1.png,-3\nplan.png,\n"


def as_it_was(cell):
    """Without the apostrophe that `csv_cell` adds."""
    return re.sub(f"^'('*{SPECIAL})", r"\1", cell)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="'=+-@\t\r\n\uff1dx1", max_size=6))
def test_any_text_comes_back(text):
    cell = csv_cell(text)
    assert not re.match(SPECIAL, cell)
    assert as_it_was(cell) == text
