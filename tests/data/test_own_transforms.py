"""Own transforms of training images: through the data module in Python, and through the command line on real YAML."""

import multiprocessing
import random

import numpy as np
import pytest
import torch
import yaml
from torchvision import tv_tensors
from torchvision.transforms import v2

from dino_lightning import CocoDataModule
from dino_lightning.__main__ import run
from dino_lightning.boxes import normalized_cxcywh_to_xyxy
from dino_lightning.errors import DataError
from tests.conftest import TINY_ARGS

V2 = "torchvision.transforms.v2"


def data_of(root, transforms, **options):
    chosen = {"image_size": 30, "max_size": 90, "num_workers": 0, "augmentation": "none", **options}
    return CocoDataModule(root=str(root), transforms=transforms, **chosen)


def batches_of(root, transforms, *, seed=0, **options):
    torch.manual_seed(seed)
    return list(data_of(root, transforms, **options).train_dataloader())


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.image_ids == other.image_ids and torch.equal(one.images, other.images)
        assert torch.equal(one.targets.boxes_cxcywh, other.targets.boxes_cxcywh)


def images_of(batches):
    """{image id: (pixels without padding, boxes in its pixels, labels)}"""
    found = {}
    for batch in batches:
        for index, image_id in enumerate(batch.image_ids):
            (height, width), count = batch.image_sizes[index], batch.targets.num_boxes[index]
            boxes = normalized_cxcywh_to_xyxy(batch.targets.boxes_cxcywh[index, :count], (height, width))
            found[image_id] = (batch.images[index, :, :height, :width], boxes, batch.targets.labels[index, :count])
    return found


class Spoilt(v2.Transform):
    """Gives what transforms must not give."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, image, target):
        return self.change(image, target)


class Global(v2.Transform):
    """Draws from Python's and NumPy's generators."""

    def forward(self, image, target):
        return (image + random.randrange(100) + int(np.random.randint(100))).to(torch.uint8), target


# ------------------------------------------------------------------ what they get and give


def test_images_boxes_and_labels_go_through(root):
    plain = images_of(batches_of(root, None))
    flipped = images_of(batches_of(root, [v2.RandomHorizontalFlip(p=1)]))
    for image_id, (pixels, boxes, labels) in plain.items():
        width = pixels.shape[2]
        mirrored = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        assert torch.equal(flipped[image_id][0], pixels.flip(2))
        torch.testing.assert_close(flipped[image_id][1], mirrored, atol=1e-3, rtol=0)
        assert torch.equal(flipped[image_id][2], labels)


def test_transforms_see_the_image_as_read_before_the_preset_resizes_it(root):
    seen = []

    def look(image, target):
        assert isinstance(image, tv_tensors.Image) and image.dtype == torch.uint8
        assert target["boxes"].format == tv_tensors.BoundingBoxFormat.XYXY
        seen.append((tuple(image.shape), target["boxes"].tolist(), target["labels"].tolist()))
        return image, target

    batches_of(root, [Spoilt(look)], image_size=60, max_size=200, augmentation="coco")
    both = [[4.0, 5.0, 24.0, 15.0], [10.0, 15.0, 16.0, 27.0]]
    assert sorted(seen) == [((3, 30, width), both, [0, 1]) for width in (40, 50, 60, 70, 80, 90)]


def test_evaluation_images_stay_as_they_are(root):
    data = data_of(root, [v2.RandomInvert(p=1)])
    (first, *_), (other, *_) = data.val_dataloader(), data_of(root, None).val_dataloader()
    assert torch.equal(first.images, other.images)


def test_boxes_that_leave_the_image_are_dropped_with_their_labels_and_others_are_clipped(root):
    for pixels, boxes, labels in images_of(batches_of(root, [v2.CenterCrop((30, 20))], image_size=20)).values():
        assert pixels.shape == (3, 30, 20)
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= 20 + 1e-4).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and len(boxes) == len(labels)
    found = images_of(batches_of(root, [v2.CenterCrop((30, 20))], image_size=20))
    # image 1 is 40 wide: columns 10 to 30 stay; image 6 is 90 wide: columns 35 to 55, right of both boxes
    torch.testing.assert_close(found[1][1], torch.tensor([[0.0, 5, 14, 15], [0, 15, 6, 27]]), atol=1e-3, rtol=0)
    assert len(found[6][1]) == 0


def test_boxes_of_another_format_and_nan_are_understood(root):
    plain = images_of(batches_of(root, None))
    converted = images_of(batches_of(root, [v2.ConvertBoundingBoxFormat("CXCYWH")]))
    for image_id, (_, boxes, _) in plain.items():
        torch.testing.assert_close(converted[image_id][1], boxes, atol=1e-3, rtol=0)

    def lose(image, target):
        boxes = target["boxes"].clone()
        boxes[0, 0] = torch.nan
        return image, {**target, "boxes": tv_tensors.wrap(boxes, like=target["boxes"])}

    assert all(labels.tolist() == [1] for _, _, labels in images_of(batches_of(root, [Spoilt(lose)])).values())


def test_without_transforms_nothing_changes(root):
    assert_same(batches_of(root, None, augmentation="coco"), batches_of(root, [], augmentation="coco"))


# ------------------------------------------------------------------ random draws


@pytest.mark.parametrize(
    "transforms",
    [pytest.param([v2.ColorJitter(0.5)], marks=pytest.mark.slow, id="torch"), pytest.param([Global()], id="global")],
)
def test_the_same_seed_gives_the_same_batches_with_any_workers(root, transforms):
    first = batches_of(root, transforms)
    random.random(), np.random.rand()
    assert_same(first, batches_of(root, transforms))
    assert_same(first, batches_of(root, transforms, num_workers=2))
    other = images_of(batches_of(root, transforms, seed=1))
    assert any(not torch.equal(pixels, other[image_id][0]) for image_id, (pixels, *_) in images_of(first).items())


def test_generators_of_others_are_left_alone(root):
    random.seed(3), np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3), np.random.seed(3)
    batches_of(root, [Global()])
    assert (random.random(), np.random.rand()) == expected


def test_a_resumed_epoch_has_the_same_batches(root):
    torch.manual_seed(0)
    data = data_of(root, [v2.ColorJitter(0.5), v2.RandomHorizontalFlip()])
    whole = list(data.train_dataloader())
    torch.manual_seed(0)
    started = data.train_dataloader()
    next(iter(started))
    resumed = data.train_dataloader()
    resumed.load_state_dict(started.state_dict())
    assert_same(whole[1:], list(resumed))


@pytest.mark.slow
def test_transforms_reach_spawned_workers(root, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    loader = data_of(root, [v2.ColorJitter(0.5)], num_workers=1).train_dataloader()
    loader.multiprocessing_context = "spawn"
    torch.manual_seed(0)
    assert len(list(loader)) == 3
    with pytest.raises(ValueError, match=r"transforms: Lambda cannot be sent to loader workers .* num_workers=0"):
        data_of(root, [v2.Lambda(lambda value: value)], num_workers=1).train_dataloader()


# ------------------------------------------------------------------ memory and shapes


def test_the_worst_case_covers_what_transforms_make_of_sizes(root):
    exact = data_of(root, None).worst_case_batch(2).images.shape
    kept = [v2.RandomApply([v2.ColorJitter(0.3), v2.GaussianBlur(3)]), v2.RandomHorizontalFlip()]
    assert data_of(root, kept).worst_case_batch(2).images.shape == exact
    for transforms in ([v2.RandomIoUCrop()], [v2.RandomZoomOut(p=1)], [v2.RandomApply([v2.CenterCrop((60, 8))], p=1)]):
        data = data_of(root, transforms, image_size=64, max_size=96, augmentation="flips", batch_size=3)
        worst = data.worst_case_batch(3).images.shape
        loader = data.train_dataloader()
        for _ in range(10):
            for batch in loader:
                assert batch.images.shape[2] <= worst[2] and batch.images.shape[3] <= worst[3]


def test_buckets_and_mosaics_go_with_transforms(root):
    options = {"augmentation": "flips", "batch_size": 2, "aspect_buckets": True}
    for batch in batches_of(root, [v2.RandomZoomOut(p=1)], **options):
        assert len({width >= height for height, width in batch.image_sizes}) == 1
    assert batches_of(root, [v2.ColorJitter(0.5)], mosaic=1.0)[0].targets.num_boxes[0] == 8


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.ToDtype(torch.float32, scale=True), r"ToDtype gives an image of shape \(3, 30, \d+\) and torch\.float32"),
        (v2.Grayscale(), r"Grayscale gives an image of shape \(1, 30, \d+\)"),
        (v2.ToPILImage(), "ToPILImage gives Image as the image"),
        (v2.TrivialAugmentWide(), r"TrivialAugmentWide fails on an image of \d+ x 30 pixels with 2 boxes"),
        (Spoilt(lambda image, target: image), "Spoilt fails on an image"),
        (Spoilt(lambda image, target: (image, {**target, "labels": target["labels"][:1]})), "Spoilt gives boxes of"),
    ],
    ids=str,
)
def test_what_a_transform_must_not_give_is_named(root, transform, message):
    with pytest.raises(DataError, match=f"^transforms: {message}"):
        batches_of(root, [v2.ColorJitter(0.1), transform])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([v2.ColorJitter], "ColorJitter is a class; give an object of it"),
        ([3], "3 is no transform of torchvision.transforms.v2"),
        ({"class_path": f"{V2}.ColorJitter"}, "must be a list of transforms"),
        ([{"brightness": 1}], "is no transform of"),
        ([{"class_path": 3}], "class_path is 3"),
        ([{"class_path": f"{V2}.ColorJitte"}], f"there is no ColorJitte in {V2}"),
        ([{"class_path": "no_such_package.Blur"}], "no_such_package.Blur cannot be imported"),
        ([{"class_path": "os.system", "init_args": {"command": "exit"}}], "os.system is no transform"),
        ([{"class_path": "torchvision.transforms.ColorJitter"}], f"Take {V2}.ColorJitter"),
        ([{"class_path": f"{V2}.ColorJitter", "brightness": 1}], "has brightness; arguments of a transform go into"),
        ([{"class_path": f"{V2}.ColorJitter", "init_args": [1]}], "must give values by name"),
        ([{"class_path": f"{V2}.ColorJitter", "init_args": {"bright": 1}}], "refuses its arguments: .*'bright'"),
        ([{"class_path": f"{V2}.RandomApply", "init_args": {"transforms": [{"class_path": "os.getcwd"}]}}], "getcwd"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_transform_is_refused_in_a_sentence(root, given, message):
    with pytest.raises(ValueError, match=f"transforms.*{message}") as caught:
        data_of(root, given)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ albumentations


@pytest.fixture
def albumentations(monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    return pytest.importorskip("albumentations")


def test_albumentations_move_boxes_and_drop_them_with_their_labels(root, albumentations):
    plain = images_of(batches_of(root, None))
    flipped = images_of(batches_of(root, [albumentations.HorizontalFlip(p=1)]))
    for image_id, (pixels, boxes, labels) in plain.items():
        width = pixels.shape[2]
        mirrored = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        assert torch.equal(flipped[image_id][0], pixels.flip(2)) and torch.equal(flipped[image_id][2], labels)
        torch.testing.assert_close(flipped[image_id][1], mirrored, atol=1e-2, rtol=0)
    corner = images_of(batches_of(root, [albumentations.Crop(0, 15, 16, 30)]))
    for pixels, _, labels in corner.values():
        assert pixels.shape[2] / pixels.shape[1] == pytest.approx(16 / 15, abs=0.05) and labels.tolist() == [1]


@pytest.mark.parametrize("fields", [None, ["labels"], ["kinds", "labels"]])
def test_a_compose_keeps_its_own_box_parameters(root, albumentations, fields):
    params = albumentations.BboxParams(format="pascal_voc", label_fields=fields, min_area=100)
    pipeline = albumentations.Compose([albumentations.HorizontalFlip(p=0.5)], bbox_params=params)
    for *_, labels in images_of(batches_of(root, [pipeline])).values():
        assert labels.tolist() == [0]  # 20 x 10 pixels; the other one has 6 x 12
    with pytest.raises(ValueError, match="bbox_params of Compose has the format coco; give pascal_voc"):
        flip = albumentations.HorizontalFlip()
        data_of(root, [albumentations.Compose([flip], bbox_params={"format": "coco"})])


def test_albumentations_draw_from_the_seed_and_independently_of_each_other(root, albumentations):
    def transforms():
        noise = albumentations.OneOf([albumentations.GaussNoise(p=1), albumentations.Blur(p=1)], p=0.7)
        return [albumentations.RandomSizedBBoxSafeCrop(20, 20), noise, v2.ColorJitter(0.3)]

    first = batches_of(root, transforms())
    assert_same(first, batches_of(root, transforms()))
    assert_same(first, batches_of(root, transforms(), num_workers=2))

    flips = albumentations.Compose([albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)])
    plain, outcomes = images_of(batches_of(root, None)), set()
    for seed in range(6):
        for image_id, (pixels, *_) in images_of(batches_of(root, [flips], seed=seed)).items():
            original = plain[image_id][0]
            turned = [original, original.flip(1), original.flip(2), original.flip(1, 2)]
            outcomes.add(next(index for index, image in enumerate(turned) if torch.equal(pixels, image)))
    assert outcomes == {0, 1, 2, 3}


def test_what_albumentations_must_not_give_is_named(root, albumentations):
    with pytest.raises(DataError, match=r"transforms: Normalize gives an image of shape .* and torch\.float32"):
        batches_of(root, [albumentations.Normalize()])
    for arguments, message in (({"sdt": 1}, "'sdt' are not valid"), ({"std_range": [3, 4]}, "std_range")):
        given = [{"class_path": "albumentations.GaussNoise", "init_args": arguments}]
        with pytest.raises(ValueError, match=f"albumentations.GaussNoise refuses its arguments: .*{message}"):
            data_of(root, given)


def test_albumentations_known_to_keep_the_size_are(root, albumentations):
    exact = data_of(root, None).worst_case_batch(2).images.shape
    assert data_of(root, [albumentations.GaussNoise()]).worst_case_batch(2).images.shape == exact
    assert data_of(root, [albumentations.RandomScale()]).worst_case_batch(2).images.shape != exact


def test_albumentations_that_are_absent_come_with_the_way_to_get_them(root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "albumentations", None)
    with pytest.raises(ValueError, match=r"albumentations.Blur cannot be imported"):
        data_of(root, [{"class_path": "albumentations.Blur"}])


# ------------------------------------------------------------------ the command line

NESTED = {
    "data": {
        "transforms": [
            {"class_path": f"{V2}.ColorJitter", "init_args": {"brightness": 0.3}},
            {
                "class_path": f"{V2}.RandomApply",
                "init_args": {"transforms": [{"class_path": f"{V2}.GaussianBlur", "init_args": {"kernel_size": 3}}]},
            },
        ],
    }
}


def test_fit_takes_transforms_from_yaml_and_checkpoints_stay_plain(rooms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(NESTED))
    arguments = ["--data.root", str(rooms), *TINY_ARGS, "--data.augmentation=none", "--trainer.log_every_n_steps=1"]
    folder = tmp_path / "run"
    assert run(["fit", "--config", "own.yaml", *arguments, "--trainer.max_epochs=1", "--run_dir", str(folder)]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["transforms"] == NESTED["data"]["transforms"]
    torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    resumed = ["fit", "--ckpt_path", str(folder), "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    assert run(resumed) == 0
    assert "Changed since the checkpoint was written:\n  trainer.max_epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([{"class_path": f"{V2}.ColorJitte"}], f"transforms: there is no ColorJitte in {V2}."),
        ([{"class_path": "torch.nn.Linear", "init_args": {"in_features": 1}}], "torch.nn.Linear is no transform"),
        ([{"class_path": f"{V2}.ToDtype", "init_args": {"dtype": "float32"}}], "ToDtype refuses its arguments"),
        ([{"class_path": f"{V2}.Grayscale"}], "transforms: Grayscale gives an image of shape (1, "),
    ],
    ids=str,
)
def test_wrong_transforms_end_a_command_with_a_sentence(rooms, tmp_path, capsys, transforms, message):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"data": {"transforms": transforms}}))
    assert run(["preview", "--config", str(path), "--data.root", str(rooms), "--output", str(tmp_path / "a.png")]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_preview_shows_own_transforms(rooms, tmp_path):
    pictures = []
    for name, transforms in (
        ("plain", []),
        ("inverted", [{"class_path": f"{V2}.RandomInvert", "init_args": {"p": 1.0}}]),
    ):
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({"data": {"augmentation": "none", "transforms": transforms}})
        )
        common = ["--config", str(tmp_path / f"{name}.yaml"), "--data.root", str(rooms), "--num_images=2"]
        assert run(["preview", *common, "--output", str(tmp_path / f"{name}.png")]) == 0
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] != pictures[1]
