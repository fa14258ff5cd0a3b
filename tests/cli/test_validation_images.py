"""The validation images of a run are found by the dataset options that it stored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from dino_lightning.cli.validation_images import validation_images
from dino_lightning.errors import DataError, UsageError
from dino_lightning.weights.stored import OPTIONS_KEY
from tests.export.exported import CLASSES, save, tiny_module

NAMES = CLASSES["class_names"]


def write_split(root: Path, split: str, ids: range, file: str) -> None:
    (root / split).mkdir(parents=True)
    for number in ids:
        Image.new("RGB", (60, 40)).save(root / split / f"{number}.png")
    images = [{"id": number, "file_name": f"{number}.png", "width": 60, "height": 40} for number in ids]
    categories = [{"id": key, "name": name} for key, name in zip(CLASSES["category_ids"], NAMES, strict=True)]
    boxes = [
        {"id": 10 * number + key, "image_id": number, "category_id": key, "bbox": [3, 4, 20, 10]}
        | {"area": 200, "iscrowd": 0}
        for number in ids
        for key in CLASSES["category_ids"]
    ]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (root / file).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Files that only the options of the run name: its validation images are not where they usually are."""
    root = tmp_path_factory.mktemp("dataset")
    write_split(root, "pages", range(10, 14), "known.json")
    write_split(root, "later", range(20, 23), "held_out.json")
    return root


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture
def options(dataset):
    files = {
        "train_annotations": str(dataset / "known.json"),
        "train_images": str(dataset / "pages"),
        "val_annotations": str(dataset / "held_out.json"),
        "val_images": str(dataset / "later"),
    }
    return {"data": {"root": str(dataset), **files, "batch_size": 2}, "model": {}, "trainer": {}}


def store(checkpoint: Path, options: dict) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, OPTIONS_KEY: yaml.safe_dump(options)}, checkpoint)
    return checkpoint


def ids(images) -> list[int]:
    return [images[index].image_id for index in range(len(images))]


def test_options_in_the_checkpoint_name_the_files(module, options, tmp_path):
    checkpoint = store(save(module, tmp_path / "best.ckpt"), options)
    images = validation_images(checkpoint, module, None)
    assert ids(images) == [20, 21, 22] and list(images.classes.names) == NAMES
    truth = images[0].ground_truth
    assert (
        truth is not None and truth.boxes_xyxy.tolist() == 3 * [[3, 4, 23, 14]] and truth.labels.tolist() == [0, 1, 2]
    )


def test_those_beside_the_run_count_where_the_checkpoint_has_none(module, options, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    checkpoint = save(module, tmp_path / "checkpoints" / "best.ckpt")
    with pytest.raises(UsageError, match="does not say where those of its run are"):
        validation_images(checkpoint, module, None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    assert ids(validation_images(checkpoint, module, None)) == [20, 21, 22]


def test_another_dataset_has_files_of_its_own_but_is_read_by_the_same_rules(module, options, dataset, tmp_path):
    options["data"] |= {"merge_classes": {"kitchen": ["door"]}}
    checkpoint = store(save(module, tmp_path / "best.ckpt"), options)
    other = tmp_path / "other"
    for split, numbers in (("train", range(30, 32)), ("val", range(40, 42))):
        write_split(other, split, numbers, f"{split}/annotations.json")
    with pytest.raises(UsageError, match=r"The classes of .*other .*room, kitchen.* are not those of"):
        validation_images(checkpoint, module, str(other))
    del options["data"]["merge_classes"]
    assert ids(validation_images(store(checkpoint, options), module, str(other))) == [40, 41]


def test_images_that_the_run_skips_are_left_out(module, options, dataset, tmp_path, capsys):
    shutil.copytree(dataset, tmp_path / "data")
    options["data"] = json.loads(json.dumps(options["data"]).replace(str(dataset), str(tmp_path / "data")))
    (tmp_path / "data" / "later" / "21.png").write_bytes(b"no image")
    checkpoint = save(module, tmp_path / "best.ckpt")
    with pytest.raises(DataError, match=r"21\.png cannot be decoded"):
        ids(validation_images(store(checkpoint, options), module, None))
    options["data"]["on_bad_image"] = "skip"
    assert ids(validation_images(store(checkpoint, options), module, None)) == [20, 22]
    assert "held_out.json: 1 of 3 images cannot be read and are left out (image ids 21)." in capsys.readouterr().err


def test_a_dataset_that_is_gone_is_named(module, options, dataset, tmp_path):
    gone = tmp_path / "moved"
    shutil.copytree(dataset, gone)
    options["data"] = json.loads(json.dumps(options["data"]).replace(str(dataset), str(gone)))
    checkpoint = store(save(module, tmp_path / "best.ckpt"), options)
    shutil.rmtree(gone)
    with pytest.raises(DataError, match="moved"):
        validation_images(checkpoint, module, None)
