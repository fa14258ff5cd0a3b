"""Map-style datasets in place of files: torchvision's detection convention through the data module and Lightning."""

import contextlib
import json
import logging
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, random_split
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.callbacks.record import fingerprint
from dino_lightning.errors import DataError
from tests.conftest import TINY_SIZES
from tests.data.small_coco import document, write_images, write_json

SMALL = {"image_size": 32, "max_size": 64, "num_workers": 0, "augmentation": "none"}
BOXES = [[4.0, 5, 24, 15], [10, 15, 16, 27]]


class Listed(Dataset):
    """Images of 40 x 30, 50 x 30, ... with two boxes, as torchvision's tutorial has them."""

    def __init__(self, count=6, kind="pillow", first_label=1, **changes):
        self.count, self.kind, self.first_label, self.changes, self.reads = count, kind, first_label, changes, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.reads += 1
        noise = np.random.default_rng(index).integers(0, 256, (30, 40 + 10 * index, 3)).astype(np.uint8)
        image = Image.fromarray(noise)
        if self.kind != "pillow":
            image = torch.from_numpy(noise).permute(2, 0, 1)
        if self.kind == "float":
            image = image / 255
        if self.kind == "tv_tensor":
            image = tv_tensors.Image(image)
        target = {"boxes": torch.tensor(BOXES), "labels": torch.tensor([0, 1]) + self.first_label}
        target |= {"image_id": index + 100, **self.changes}
        return image, {key: value for key, value in target.items() if value is not ...}


def data_of(train, val=None, **options):
    return CocoDataModule.from_datasets(train, val or Listed(3), **{**SMALL, **options})


@pytest.fixture
def said(lightning_log):
    lightning_log.set_level(logging.INFO)
    return lightning_log


# ------------------------------------------------------------------ what is understood


@pytest.mark.parametrize("kind", ["pillow", "tensor", "float", "tv_tensor"])
def test_batches_are_those_of_files(root, kind):
    """The images of the dataset written as files give the same batches, ids apart."""
    dataset, content = Listed(kind=kind), document(6)
    for index, entry in enumerate(content["images"]):
        image = Listed()[index][0]
        image.save(root / "images" / entry["file_name"])
    write_json(root / "train.json", content)
    batches = []
    for data in (CocoDataModule(root=str(root), **SMALL), data_of(dataset)):
        torch.manual_seed(0)
        batches.append(list(data.train_dataloader()))
    for one, other in zip(*batches, strict=True):
        assert [image_id + 99 for image_id in one.image_ids] == list(other.image_ids)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets.boxes_cxcywh, other.targets.boxes_cxcywh)
        assert torch.equal(one.targets.labels, other.targets.labels)


@pytest.mark.parametrize("box_format", ["XYWH", "CXCYWH", "XYXY"])
def test_boxes_of_any_format_are_converted(box_format):
    xyxy = tv_tensors.BoundingBoxes(torch.tensor(BOXES), format="XYXY", canvas_size=(30, 40))
    boxes = v2.ConvertBoundingBoxFormat(box_format)(xyxy)
    assert data_of(Listed(boxes=boxes)).train_set.annotations.boxes_xyxy[:2].tolist() == BOXES


def test_crowd_regions_areas_and_images_without_boxes_are_kept():
    data = data_of(Listed(), Listed(2, iscrowd=torch.tensor([0, 1]), area=torch.tensor([150.0, 40])))
    (batch, _) = data.val_dataloader()
    assert batch.ground_truth[0].iscrowd.tolist() == [False, True]
    assert batch.ground_truth[0].area.tolist() == [150, 40]
    assert data.val_set.annotations.summary.crowd == 2
    empty = Listed(2, boxes=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
    assert data_of(Listed(), empty).val_set.annotations.summary.images_without_boxes == 2


def test_torchvisions_coco_dataset_and_subsets_of_it(root, said, monkeypatch):
    decoded = []
    load = CocoDetection._load_image
    monkeypatch.setattr(CocoDetection, "_load_image", lambda self, key: decoded.append(key) or load(self, key))
    (root / "all.json").write_text(json.dumps(json.loads((root / "train.json").read_text())))
    whole = CocoDetection(str(root / "images"), str(root / "all.json"))
    train, val = random_split(whole, [4, 2], generator=torch.Generator().manual_seed(1))
    data = data_of(Subset(train, [2, 0]), val)  # sizes and boxes are in memory: no image is decoded
    assert not decoded
    assert data.class_names == ["kitchen", "bath"] and data.category_ids == [1, 2]
    expected = {whole.ids[train.indices[2]], whole.ids[train.indices[0]]}
    assert {image.id for image in data.train_set.annotations.images} == expected
    assert not any("numbered" in message for message in said.messages)
    (batch, _) = data.val_dataloader()
    assert batch.ground_truth[0].boxes_xyxy.tolist() == BOXES
    assert len(decoded) == 2


def test_a_coco_dataset_with_transforms_of_its_own_is_asked_for_its_images(root):
    widened = v2.Compose([v2.ToImage(), v2.Resize((60, 80))])
    data = data_of(CocoDetection(str(root / "images"), str(root / "train.json"), transform=widened))
    assert {image.size for image in data.train_set.annotations.images} == {(60, 80)}
    assert len(list(data.train_dataloader())) == 3


def test_a_coco_dataset_keeps_the_ids_of_images_without_annotations(root):
    content = document(4)
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 3]
    write_images(root / "images", content)
    write_json(root / "some.json", content)
    data = data_of(CocoDetection(str(root / "images"), str(root / "some.json")))
    assert [image.id for image in data.train_set.annotations.images] == [1, 2, 3, 4]


# ------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    ("first", "names", "expected"),
    [
        (1, None, {1: "class 1", 2: "class 2"}),
        (5, None, {5: "class 5", 6: "class 6"}),
        (1, ["kitchen", "bath", "cellar"], {1: "kitchen", 2: "bath", 3: "cellar"}),
        (0, ["kitchen", "bath"], {0: "kitchen", 1: "bath"}),
        (1, ["__background__", "kitchen", "bath"], {1: "kitchen", 2: "bath"}),
        (5, {6: "bath", 5: "kitchen"}, {5: "kitchen", 6: "bath"}),
    ],
    ids=str,
)
def test_labels_become_classes_and_it_is_said_how(said, first, names, expected):
    unused = len(expected) > 2
    with pytest.warns(match="1 of 3 classes .*: cellar") if unused else contextlib.nullcontext():
        data = data_of(Listed(first_label=first), Listed(2, first_label=first), class_names=names)
    assert dict(zip(data.category_ids, data.class_names, strict=True)) == expected
    told = [message for message in said.messages if message.startswith("Labels of the datasets: ")]
    assert len(told) == 1 and all(f"{value} is {name}" in told[0] for value, name in expected.items())
    (batch, *_) = data.val_dataloader()
    first_index = list(expected).index(first)
    assert batch.targets.labels.tolist() == [[first_index, first_index + 1]]


def test_labels_without_a_name_or_unknown_to_training_are_refused():
    with pytest.raises(DataError, match="class_names: the labels 2 of the train dataset have no name"):
        data_of(Listed(), class_names=["kitchen"])
    with pytest.raises(DataError, match=r"val dataset: category 3 .* is no class of the training"):
        data_of(Listed(), Listed(2, first_label=2))


def test_boxes_that_are_dropped_or_clipped_are_told():
    boxes = torch.tensor([[4.0, 5, 4, 15], [30, 15, 600, 27]])
    message = "val dataset: 3 boxes without area inside their image are dropped; 3 boxes that stick out, by up to"
    with pytest.warns(UserWarning, match=message):
        (batch, *_) = data_of(Listed(), Listed(3, boxes=boxes)).val_dataloader()
    assert batch.ground_truth[0].boxes_xyxy.tolist() == [[30, 15, 600, 27]]


# ------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(2, 5)}, r"boxes have the shape \(2, 5\); it must be N x 4"),
        (
            {"boxes": torch.tensor([[4.0, 5, 2, 9], [1, 1, 2, 2]])},
            r"the box \[4.0, 5.0, 2.0, 9.0\] ends before it begins",
        ),
        ({"boxes": torch.full((2, 4), torch.nan)}, "boxes has values that are not finite"),
        ({"boxes": "none"}, "boxes cannot be read as numbers"),
        ({"labels": torch.tensor([1])}, r"labels has the shape \(1,\) beside 2 boxes"),
        ({"labels": torch.tensor([1.5, 2])}, r"labels are \[1.5, 2.0\]; they must be whole numbers"),
        ({"iscrowd": torch.tensor([1])}, "iscrowd has the shape"),
        ({"boxes": ...}, "the target is a dict with labels, image_id; it must be a dict with boxes and labels"),
    ],
    ids=str,
)
def test_a_fault_of_a_target_is_named_with_its_index(changes, message):
    with pytest.raises(DataError, match=rf"^train dataset\[0\]: {message}"):
        data_of(Listed(**changes))


class Faulty(Dataset):
    """Gives one item, whatever it is, after a good one."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index == 0:
            return Listed()[0]
        if isinstance(self.item, Exception):
            raise self.item
        return self.item


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (KeyError("gone"), r" cannot be read \(KeyError: 'gone'\)"),
        (Image.new("RGB", (4, 4)), " gives a Image; it must give a pair: image, target"),
        (
            (torch.full((3, 8, 8), -2.0), {}),
            r": the image is \(3, 8, 8\) of torch.float32 with values from -2 to -2; it must be a Pillow image",
        ),
        (("a.png", {}), ": the image is str"),
        ((Image.new("RGB", (4, 4)), [{"bbox": [1, 2, 3, 4]}]), ": the target is a list with something else"),
        ((Image.new("RGB", (4, 4)), None), ": the target is NoneType"),
    ],
    ids=["error", "no pair", "float image", "file name", "odd list", "no target"],
)
def test_a_fault_of_an_item_is_named_with_its_index(item, message):
    with pytest.raises(DataError, match=rf"^val dataset\[1\]{message}"):
        data_of(Listed(), Faulty(item))


def test_what_cannot_be_a_dataset_or_an_option_is_refused(tmp_path):
    with pytest.raises(DataError, match="train dataset: a generator has no length"):
        data_of(pair for pair in Listed())
    with pytest.raises(DataError, match="val dataset: a NoneType has no length"):
        CocoDataModule.from_datasets(Listed(), None, **SMALL)
    with pytest.raises(DataError, match="train dataset: it has no images"):
        data_of(Listed(0))
    with pytest.raises(DataError, match="train dataset: no box to learn from: it has no annotations"):
        data_of(Listed(boxes=torch.zeros(0, 4), labels=torch.zeros(0)))
    with pytest.raises(ValueError, match="cache_dir is about files on disk"):
        data_of(Listed(), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="batch_size is 0"):
        data_of(Listed(), batch_size=0)


class Growing(Listed):
    """Gives other images after a while, as a dataset with random transforms does."""

    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return (image.resize((99, 99)) if self.reads > len(self) else image), target


def test_a_dataset_whose_images_change_is_noticed():
    message = r"train dataset\[\d\]: the image is 99 x 99 now, and was \d+ x 30 when its boxes were read"
    with pytest.raises(DataError, match=message):
        list(data_of(Growing()).train_dataloader())


def test_images_that_cannot_be_read_later_are_left_out_if_asked_to():
    class Vanishing(Listed):
        def __getitem__(self, index):
            if index == 2 and self.reads >= len(self):
                raise OSError("no such image")
            return super().__getitem__(index)

    data = data_of(Vanishing(), on_bad_image="skip")
    with pytest.warns(
        UserWarning, match=r"train dataset: 1 of 6 images cannot be read and are left out \(image ids 102"
    ):
        batches = list(data.train_dataloader())
    assert {image_id for batch in batches for image_id in batch.image_ids} <= {100, 101, 103, 104, 105}
    with pytest.raises(DataError, match=r"Image 102 of train dataset: train dataset\[2\] cannot be read"):
        list(data_of(Vanishing()).train_dataloader())


# ------------------------------------------------------------------ everything else


def test_images_are_numbered_where_their_ids_are_not_their_own(said):
    data = data_of(Listed(image_id=torch.tensor([7])), Listed(2, image_id="plan.png"))
    assert [image.id for image in data.train_set.annotations.images] == list(range(6))
    assert [image.id for image in data.val_set.annotations.images] == [0, 1]
    assert sum("images are numbered from 0" in message for message in said.messages) == 2


def test_images_are_read_when_they_are_needed():
    train = Listed(4)
    data = data_of(train, batch_size=2)
    assert train.reads == 4
    data.worst_case_batch(2), data.class_table(), data.summary(), fingerprint(data)
    assert train.reads == 4
    list(data.train_dataloader())
    assert train.reads == 8


def test_what_is_known_of_files_is_known_of_datasets():
    data = data_of(Listed(), test=Listed(2), batch_size=3, repeat_factor_threshold=1.0)
    assert data.summary().splitlines()[0].startswith("train: 6 images, 12 boxes") and len(data.test_set) == 2
    assert data.class_table().splitlines()[1].split() == ["1", "0", "class", "1", "6", "3"]
    assert data.worst_case_batch(2).images.shape == (2, 3, 32, 64) and data.most_boxes == 2
    assert data.images_per_epoch == 6 and data.num_classes == 2
    assert len({split["sha256"] for split in fingerprint(data).values()}) == 3
    assert Path("train dataset") == data.train_set.annotations.path


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_dataset(context):
    torch.manual_seed(0)
    expected = list(data_of(Listed()).train_dataloader())
    torch.manual_seed(0)
    loader = data_of(Listed(), num_workers=2).train_dataloader()
    loader.multiprocessing_context = context
    for one, other in zip(expected, loader, strict=True):
        assert one.image_ids == other.image_ids and torch.equal(one.images, other.images)


def test_lightning_trains_on_a_subset_and_evaluates(tmp_path):
    data = data_of(Subset(Listed(8), [1, 3, 5, 7]), Subset(Listed(8), [0, 2]), transforms=[v2.ColorJitter(0.3)])
    model = DINOModule(num_classes=data.num_classes, **TINY_SIZES, backbone_weights=None)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, data)
    assert trainer.global_step == 2
    assert model.hparams["class_names"] == ["class 1", "class 2"]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    torch.load(checkpoint, weights_only=True)
    metrics = trainer.validate(model, data, verbose=False)[0]
    assert 0 <= metrics["val/AP"] <= 1 and 0 <= metrics["val/F1"] <= 1
