from __future__ import annotations

import logging
import multiprocessing
import re
import shutil
import warnings
from types import SimpleNamespace

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image

from dino_lightning.boxes import normalized_cxcywh_to_xyxy, xyxy_to_normalized_cxcywh
from dino_lightning.data import CocoDataModule, Sample, collate
from dino_lightning.data.loading import default_workers
from dino_lightning.data.sizes import resized_size
from dino_lightning.errors import DataError
from dino_lightning.structures import Batch
from tests.data.small_coco import annotation, document, write_images, write_json, write_split


def small(root, **arguments) -> CocoDataModule:
    """A data module with images small enough for fast tests."""
    return CocoDataModule(**{"root": str(root), "image_size": 32, "max_size": 64, "num_workers": 0, **arguments})


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.images, second.images)
    assert (first.image_ids, first.image_sizes) == (second.image_ids, second.image_sizes)
    assert first.targets.num_boxes == second.targets.num_boxes
    assert torch.equal(first.targets.boxes_cxcywh, second.targets.boxes_cxcywh)
    assert torch.equal(first.targets.labels, second.targets.labels)


# --- collate ---


@st.composite
def samples(draw) -> tuple[Sample, list[list[int]]]:
    height, width = draw(st.integers(1, 900)), draw(st.integers(1, 900))
    boxes = []
    for _ in range(draw(st.integers(0, 4))):
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append([x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))])
    boxes_xyxy = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    sample = Sample(
        image=torch.full((3, height, width), draw(st.integers(1, 255)), dtype=torch.uint8),
        boxes_cxcywh=xyxy_to_normalized_cxcywh(boxes_xyxy, (height, width)),
        labels=torch.arange(len(boxes)) + 1,
        image_id=draw(st.integers(0, 10**12)),
        original_size=(2 * height, 2 * width),
    )
    return sample, boxes


@settings(deadline=None, max_examples=50)
@given(st.lists(samples(), min_size=1, max_size=4), st.sampled_from([1, 32, 50]))
def test_padding_leaves_pixels_and_boxes_where_they_were(drawn, multiple):
    batch = collate([sample for sample, _ in drawn], pad_to_multiple=multiple)
    height, width = batch.images.shape[-2:]
    assert height % multiple == 0 and width % multiple == 0
    assert height - multiple < max(size[0] for size in batch.image_sizes) <= height
    assert batch.images.dtype == torch.uint8
    assert batch.targets.num_boxes == tuple(len(boxes) for _, boxes in drawn)
    assert batch.ground_truth is None
    for index, (sample, boxes) in enumerate(drawn):
        size, count = batch.image_sizes[index], len(boxes)
        assert (batch.image_ids[index], batch.original_sizes[index]) == (
            sample.image_id,
            sample.original_size,
        )
        assert torch.equal(batch.images[index, :, : size[0], : size[1]], sample.image)
        assert int(batch.images[index].count_nonzero()) == sample.image.numel()
        found = normalized_cxcywh_to_xyxy(batch.targets.boxes_cxcywh[index, :count], size)
        expected = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        assert batch.targets.labels[index, :count].tolist() == list(range(1, count + 1))
        assert not batch.targets.boxes_cxcywh[index, count:].any()


# --- what is known at once ---


def test_classes_are_known_before_any_image_is_opened(root):
    for path in (root / "images").iterdir():
        path.write_bytes(b"no image")
    data = small(root)
    assert (data.num_classes, data.class_names, data.category_ids) == (2, ["kitchen", "bath"], [1, 2])
    assert data.summary().splitlines() == [
        f"train: 6 images, 12 boxes, 0 crowd, 0 degenerate dropped, 0 clipped, 0 images without boxes "
        f"({root / 'train.json'})",
        f"val: 3 images, 6 boxes, 0 crowd, 0 degenerate dropped, 0 clipped, 0 images without boxes "
        f"({root / 'val.json'})",
    ]


def test_the_class_table_shows_ids_labels_names_and_boxes(root):
    content = document(count=2)
    content["categories"] = [{"id": 10 * k + 3, "name": f"room {k}"} for k in range(14, -1, -1)]
    content["annotations"] = [
        annotation(1, 1, 13, [1, 1, 5, 5]),
        annotation(2, 1, 13, [2, 2, 5, 5]),
        annotation(3, 1, 13, [2, 2, 5, 5], iscrowd=1),
        annotation(4, 1, 13, [2, 2, 0, 5]),
        annotation(5, 2, 3, [2, 2, 5, 5]),
    ]
    write_json(root / "train.json", content)
    content["annotations"] = content["annotations"][:1]
    write_json(root / "val.json", content)
    with (
        pytest.warns(UserWarning, match="1 boxes without area"),
        pytest.warns(UserWarning, match="13 of 15 classes have no box to learn from: room 2, .* and 8 more"),
    ):
        lines = small(root).class_table().splitlines()
    assert lines[0].split() == ["category_id", "label", "name", "train", "boxes", "val", "boxes"]
    assert lines[1].split() == ["3", "0", "room", "0", "1", "0"]
    assert lines[2].split() == ["13", "1", "room", "1", "2", "1"]
    assert lines[12].split() == ["113", "11", "room", "11", "0", "0"]
    assert lines[13:] == ["... and 3 more"]


def test_repairs_are_told_once_per_file(root):
    content = document(count=6)
    content["annotations"] += [
        annotation(90, 1, 1, [5, 5, 0, 3]),
        annotation(91, 2, 1, [45, 5, 50, 3]),
        annotation(92, 2, 1, [45, 5, 50, 4]),
    ]
    write_json(root / "train.json", content)
    with pytest.warns(UserWarning) as caught:
        small(root)
    messages = [str(warning.message) for warning in caught if "dropped" in str(warning.message)]
    assert messages == [
        f"{root / 'train.json'}: 1 boxes without area inside their image are dropped; "
        "2 boxes that stick out, by up to 45 pixels, are clipped to their image for training."
    ]


def test_a_pixel_of_rounding_is_no_alarm(root, lightning_log):
    content = document(count=6)
    content["annotations"].append(annotation(90, 1, 1, [20, 5, 20.499, 10]))  # 40 pixels wide
    write_json(root / "train.json", content)
    small(root)  # a warning would be an error here
    (line,) = [line for line in lightning_log.messages if "stick out" in line]
    assert line.endswith("1 boxes that stick out, by up to 0.499 pixels, are clipped to their image for training.")


def test_the_root_category_is_left_out_aloud(root, lightning_log):
    for name in ("train.json", "val.json"):
        content = document(count=2)
        content["categories"] = [
            {"id": 0, "name": "rooms", "supercategory": "none"},
            *({**category, "supercategory": "rooms"} for category in content["categories"]),
        ]
        write_json(root / name, content)
    with lightning_log.at_level(logging.INFO):
        data = small(root)
    assert data.category_ids == [1, 2]
    assert "Category 0 ('rooms') has no annotations and is the supercategory of all others" in lightning_log.text


def test_classes_that_differ_between_files_are_refused(root):
    content = document(count=2)
    content["categories"] = [{"id": 1, "name": "kitchen"}, {"id": 2, "name": "cellar"}]
    write_json(root / "val.json", content)
    with pytest.raises(DataError, match=r"val\.json: category 2 is named 'cellar' here but 'bath'"):
        small(root)


def test_a_wrong_image_folder_is_noticed_at_once(root):
    pictures = shutil.move(root / "images", root.parent / "pictures")
    (root / "images").mkdir()
    with pytest.raises(DataError, match=r"1\.png does not exist \(nor do the next 5 images listed\)"):
        small(root)
    assert len(small(root, train_images=str(pictures), val_images=str(pictures)).train_set) == 6


@pytest.mark.parametrize(
    ("argument", "value"),
    [("batch_size", 0), ("val_batch_size", 0), ("image_size", 0), ("max_size", -1), ("fixed_size", 0),
     ("pad_to_multiple", 0), ("num_workers", -1), ("val_fraction", 0.0), ("val_fraction", 1.0),
     ("on_bad_image", "ignore"), ("augmentation", "strong")],
)  # fmt: skip
def test_arguments_out_of_range_are_named(root, argument, value):
    with pytest.raises(ValueError, match=re.escape(str(value))) as caught:
        small(root, **{argument: value})
    assert argument in str(caught.value)


def test_the_command_line_knows_every_argument(root):
    parser = ArgumentParser()
    parser.add_class_arguments(CocoDataModule, "data")
    options = parser.parse_args(
        [f"--data.root={root}", "--data.augmentation=plans", "--data.fixed_size=64", "--data.num_workers=0"]
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # jsonargparse before 4.49
    data = instantiate(options).data
    assert next(iter(data.train_dataloader())).images.shape == (2, 3, 64, 64)
    assert all(action.help for action in parser._actions if action.dest.startswith("data."))


# --- loaders ---


def test_evaluation_batches_hold_each_image_once_and_pad_nothing(root):
    content = document(count=7)
    for entry, width in zip(content["images"], (40, 50, 40, 40, 50, 60, 40), strict=True):
        entry["width"] = width
    write_images(root / "images", content)
    write_json(root / "val.json", content)
    data = small(root, val_batch_size=3, pad_to_multiple=32)
    batches = list(data.val_dataloader())
    assert [batch.image_ids for batch in batches] == [(1, 3, 4), (2, 5), (6,), (7,)]
    assert batches[1].original_sizes == ((30, 50), (30, 50)) and batches[1].image_sizes == ((32, 53), (32, 53))
    assert all(tuple(batch.images.shape[2:]) == batch.image_sizes[0] for batch in batches)
    assert [truth.boxes_xyxy.tolist() for truth in batches[2].ground_truth] == [[[4, 5, 24, 15], [10, 15, 16, 27]]]
    assert batches[2].targets.labels.tolist() == [[0, 1]]
    in_order = [batch.image_ids for batch in data.predict_dataloader()]
    assert in_order == [(1,), (2,), (3, 4), (5,), (6,), (7,)]


def test_training_shuffles_and_drops_the_incomplete_batch(root):
    torch.manual_seed(0)
    loader = small(root, batch_size=4).train_dataloader()
    passes = [[image_id for batch in loader for image_id in batch.image_ids] for _ in range(8)]
    assert {len(ids) for ids in passes} == {4}
    assert set().union(*passes) == {1, 2, 3, 4, 5, 6} and len(set(map(tuple, passes))) > 1
    assert next(iter(loader)).ground_truth is None


def test_a_training_set_smaller_than_a_batch_still_trains(root):
    batches = list(small(root, batch_size=7).train_dataloader())
    assert [len(batch) for batch in batches] == [6]


@pytest.mark.parametrize(("processes", "drops"), [(1, True), (2, False)])
def test_a_last_batch_is_dropped_only_if_a_process_has_another(root, processes, drops):
    data = small(root, batch_size=4)
    strategy = SimpleNamespace(broadcast=lambda value: value)
    data.trainer = SimpleNamespace(world_size=processes, num_devices=processes, global_rank=0, strategy=strategy)
    assert data.train_dataloader().drop_last is drops
    assert data.val_dataloader().drop_last is False


def test_a_fixed_size_shapes_the_canvas(root):
    for batch in small(root, fixed_size=48, batch_size=3).train_dataloader():
        assert batch.images.shape == (3, 3, 48, 48)
    # The published rule would make 50 of the long side here.
    assert resized_size((30, 190), 48, 48) == (8, 50)
    content = document(count=1)
    content["images"][0]["width"] = 190
    write_images(root / "images", content)
    for split in ("train", "val"):
        write_json(root / f"{split}.json", content)
    data = small(root, fixed_size=48, image_size=800, augmentation="none", batch_size=1)
    (batch,) = data.train_dataloader()
    assert batch.images.shape == (1, 3, 48, 48) and batch.image_sizes == ((8, 48),)
    (batch,) = data.val_dataloader()  # as `detect` sees it: nothing is padded, so nothing has to fit
    assert batch.images.shape == (1, 3, 8, 50) and batch.image_sizes == ((8, 50),)


def test_sizes_vary_within_a_fixed_canvas(root):
    torch.manual_seed(0)
    loader = CocoDataModule(root=str(root), fixed_size=48, num_workers=0).train_dataloader()
    longest = [max(size) for _ in range(5) for batch in loader for size in batch.image_sizes]
    assert min(longest) < 40 and max(longest) == 48


def test_a_multiple_shapes_the_canvas(root):
    (batch,) = small(root, pad_to_multiple=32, batch_size=6).train_dataloader()
    assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
    assert max(width for _, width in batch.image_sizes) < batch.images.shape[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_batches(root, workers):
    passes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        passes.append(list(small(root, num_workers=workers).train_dataloader()))
    for first, second in zip(passes[0], passes[1], strict=True):
        assert_same(first, second)
    assert any(a.images.shape != b.images.shape for a, b in zip(passes[0], passes[2], strict=True))


def count_threads(example):
    example.image.fill_(torch.get_num_threads())
    return example


def test_workers_compute_with_one_thread(root):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        data = small(root, num_workers=1)
        data.val_set.transform = count_threads
        assert {int(batch.images.max()) for batch in data.val_dataloader()} == {1}
    finally:
        torch.set_num_threads(before)


def test_workers_are_chosen_from_cores_and_images(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12), raising=False)
    assert default_workers(images=10, processes=1) == 0
    assert default_workers(images=1000, processes=1) == 8
    assert default_workers(images=1000, processes=4) == 3
    assert default_workers(images=1000, processes=100) == 1


def test_without_a_validation_split_images_are_held_out(root, lightning_log):
    (root / "val.json").unlink()
    with lightning_log.at_level(logging.INFO):
        data = small(root, val_fraction=0.34)
    assert (
        f"No validation split found: 2 of the 6 images of {root / 'train.json'} are held out for validation "
        "(val_fraction 0.34, seed 0)."
    ) in lightning_log.text
    validation = {image_id for batch in data.val_dataloader() for image_id in batch.image_ids}
    training = {image.id for image in data.train_set.annotations.images}
    assert len(validation) == 2 and validation | training == {1, 2, 3, 4, 5, 6}


def test_testing_falls_back_to_the_validation_split(root, lightning_log):
    with lightning_log.at_level(logging.INFO):
        ids = [batch.image_ids for batch in small(root).test_dataloader()]
    assert ids == [(101,), (102,), (103,)]
    assert "No test split found: the validation split is used instead." in lightning_log.text

    write_split(root / "test.json", root / "images", count=1, first_id=201)
    assert [batch.image_ids for batch in small(root).test_dataloader()] == [(201,)]
    assert [batch.image_ids for batch in small(root).predict_dataloader()] == [(201,)]


# --- images that do not fit or cannot be read ---


def test_an_image_of_another_size_than_annotated_is_refused(root):
    Image.new("RGB", (44, 30)).save(root / "images/101.png")
    with pytest.raises(DataError) as caught:
        list(small(root, on_bad_image="skip").val_dataloader())
    assert f"Image 101 of {root / 'val.json'}: width and height are 40 x 30 in the annotations" in str(caught.value)
    assert f"but 44 x 30 in {root / 'images/101.png'}" in str(caught.value)


def test_boxes_are_taken_in_the_frame_in_which_the_image_is_displayed(root):
    stored = Image.new("RGB", (30, 40))  # a quarter turn makes it 40 x 30, as annotated
    stored.paste((255, 0, 0), (5, 16, 15, 36))
    exif = stored.getexif()
    exif[0x0112] = 6
    stored.save(root / "images/101.png", exif=exif)
    batch = next(iter(small(root, image_size=30).val_dataloader()))
    rows, columns = (batch.images[0, 0] > 0).nonzero(as_tuple=True)
    painted = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    assert painted == batch.ground_truth[0].boxes_xyxy[0].tolist() == [4, 5, 24, 15]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_an_unreadable_image_is_named(root, damage, workers):
    path = root / "images/102.png"
    data = small(root, num_workers=workers)
    path.unlink() if damage == "missing" else path.write_bytes(b"no image")
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError) as caught:
        list(data.val_dataloader())
    assert set(multiprocessing.active_children()) <= before  # though the traceback still knows the iterator
    assert f"Image 102 of {root / 'val.json'}: {path} " in str(caught.value)
    assert {"missing": "does not exist", "broken": "cannot be decoded"}[damage] in str(caught.value)
    assert "on_bad_image=skip" in str(caught.value)


def test_absent_images_are_refused_before_training_with_the_command_that_shows_all(root):
    for image_id in (2, 5):
        (root / f"images/{image_id}.png").unlink()
    with pytest.raises(DataError) as caught:
        small(root)
    message = str(caught.value)
    assert "2 of 6 images listed do not exist" in message and "image 2, " in message
    assert message.endswith(f"python -m dino_lightning inspect --data.root {root}")
    assert len(small(root, on_bad_image="skip").train_set) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_can_be_left_out_with_a_count(root, workers):
    (root / "images/2.png").write_bytes(b"no image")
    (root / "images/5.png").unlink()
    content = document(count=6)
    del content["annotations"][2]  # image 2 has one box, so that no other image could pass with its labels
    write_json(root / "train.json", content)
    data = small(root, on_bad_image="skip", num_workers=workers, batch_size=2, augmentation="none")
    with pytest.warns(UserWarning) as caught:
        loader = data.train_dataloader()
    expected = f"{root / 'train.json'}: 2 of 6 images cannot be read and are left out (image ids 2, 5)."
    assert [str(warning.message) for warning in caught if "left out" in str(warning.message)] == [expected]
    assert len(loader) == 2
    for _ in range(2):
        batches = list(loader)
        assert sorted(image_id for batch in batches for image_id in batch.image_ids) == [1, 3, 4, 6]
        for batch in batches:  # each image still has its own boxes
            for index, image_id in enumerate(batch.image_ids):
                assert batch.original_sizes[index] == (30, 30 + 10 * image_id)
                assert batch.targets.labels[index].tolist() == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.train_dataloader()  # neither read nor told again


def test_a_file_of_unreadable_images_alone_is_refused(root):
    for image_id in (101, 102, 103):
        (root / f"images/{image_id}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"val\.json: not one of its 3 images can be read"):
        small(root, on_bad_image="skip").val_dataloader()


# --- with Lightning ---


class Recorder(lightning.LightningModule):
    """Notes what arrives."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[int]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch, _):
        assert isinstance(batch, Batch) and batch.images.dtype == torch.uint8
        self.seen["train"] += batch.image_ids
        return self.weight * batch.targets.boxes_cxcywh.sum()

    def validation_step(self, batch, _):
        assert len(batch.ground_truth) == len(batch)
        self.seen["val"] += batch.image_ids

    def test_step(self, batch, _):
        self.seen["test"] += batch.image_ids

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(folder):
    """Two epochs, and nothing but them."""
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_trainer_runs_on_it_even_with_unreadable_images(root, tmp_path, workers):
    (root / "images/3.png").unlink()
    (root / "images/102.png").unlink()
    trainer = quiet_trainer(tmp_path)
    module, data = Recorder(), small(root, on_bad_image="skip", num_workers=workers, batch_size=1)
    trainer.fit(module, data)
    assert sorted(module.seen["train"]) == [1, 1, 2, 2, 4, 4, 5, 5, 6, 6]
    assert module.seen["val"] == [101, 103] * 2
    trainer.test(module, data, verbose=False)
    assert module.seen["test"] == [101, 103]
