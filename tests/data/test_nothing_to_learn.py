"""Datasets that nothing can be learnt from: refused before training, with the reason; crowd regions read as objects."""

import json
import shutil

import pytest

from dino_lightning.__main__ import run
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import DataError
from tests.conftest import TINY_ARGS


@pytest.fixture
def dataset(rooms, tmp_path):
    """A copy of the plans whose annotation files `change` rewrites."""
    root = shutil.copytree(rooms, tmp_path / "plans")

    def change(rule, splits=("train", "val")):
        for split in splits:
            (file,) = (root / split).glob("*.json")
            content = json.loads(file.read_text())
            content["annotations"] = [entry for entry in map(rule, content["annotations"]) if entry is not None]
            file.write_text(json.dumps(content))
        return root

    return change


def as_crowd(entry):
    return {**entry, "iscrowd": 1}


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (as_crowd, r"all \d+ annotations are crowd regions \(iscrowd 1\), as CVAT exports masks. --data.crowd objects"),
        (lambda entry: None, "no box to learn from: it has no annotations"),
        (lambda entry: {**entry, "bbox": [0, 0, 0, 0]}, r"all \d+ annotations are boxes without area inside"),
        (
            lambda entry: as_crowd(entry) if entry["id"] % 2 else {**entry, "bbox": [5, 5, 0, 3]},
            r"of \d+ annotations \d+ are crowd regions .*, and \d+ are boxes without area .*--data.crowd objects",
        ),
    ],
    ids=["crowd", "none", "zero", "both"],
)
def test_it_is_refused_with_the_reason(dataset, rule, reason, tmp_path, capsys):
    root = dataset(rule)
    with pytest.raises(DataError, match=reason):
        CocoDataModule(root=str(root))
    assert run(["inspect", "--data.root", str(root), "--output", str(tmp_path / "health")]) == 1
    found = json.loads((tmp_path / "health" / "health.json").read_text())["findings"]
    assert ("nothing-to-learn", "error") in {(finding["kind"], finding["severity"]) for finding in found}
    run_dir = tmp_path / "run"
    assert run(["fit", "--data.root", str(root), "--run_dir", str(run_dir), "--trainer.max_epochs=1", *TINY_ARGS]) == 1
    assert "no box to learn from" in capsys.readouterr().err
    assert not run_dir.exists()


def test_crowd_regions_are_objects_where_the_user_says_so(dataset, rooms, tmp_path):
    root = dataset(as_crowd)
    read, plain = CocoDataModule(root=str(root), crowd="objects"), CocoDataModule(root=str(rooms))
    assert read.class_table() == plain.class_table()
    assert not read.val_set.annotations.iscrowd.any()
    options = ["--data.root", str(root), "--data.crowd", "objects"]
    assert run(["inspect", *options, "--output", str(tmp_path / "health")]) == 0
    run_dir = tmp_path / "run"
    assert run(["fit", *options, "--run_dir", str(run_dir), "--trainer.max_epochs=1", *TINY_ARGS]) == 0
    assert "crowd: objects" in (run_dir / "config.yaml").read_text()


def test_the_published_meaning_of_crowd_stays_the_default(dataset):
    data = CocoDataModule(root=str(dataset(lambda entry: as_crowd(entry) if entry["id"] == 1 else entry)))
    assert data.train_set.annotations.summary.crowd == 1


def test_a_class_without_a_box_is_named(dataset):
    root = dataset(lambda entry: entry)
    for file in root.glob("*/*.json"):
        content = json.loads(file.read_text())
        content["categories"] += [{"id": 90 + number, "name": f"door {number}"} for number in range(7)]
        file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="7 of 8 classes have no box to learn from: door 0, .*, door 4 and 2 more"):
        CocoDataModule(root=str(root))


def test_a_validation_split_without_a_box_is_said_to_say_nothing(dataset):
    root = dataset(lambda entry: None, splits=("val",))
    with pytest.warns(UserWarning, match="no box to evaluate against, so AP and F1 say nothing"):
        CocoDataModule(root=str(root))


def test_a_wrong_word_for_crowd(rooms):
    with pytest.raises(ValueError, match="crowd is 'yes'; choose regions or objects"):
        CocoDataModule(root=str(rooms), crowd="yes")
