"""Test-time augmentation: images seen flipped and turned, and what is found in the views fused into one."""

import re

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning import Batch, CocoDataModule, Detections, DINOModule, load_detector
from dino_lightning.__main__ import run
from dino_lightning.inference.detector import load_plain_model
from dino_lightning.training.test_time_augmentation import (
    ORIENTATIONS,
    fuse,
    orientation_groups,
    orientations,
    seen_batch,
)
from tests.conftest import TINY_ARGS
from tests.inference.test_detector import save_tiny
from tests.training.test_module import QUIET, tiny_module


def found(boxes, scores, labels=None):
    labels = [0] * len(scores) if labels is None else labels
    return Detections(torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores), torch.tensor(labels))


@pytest.mark.parametrize("way", ORIENTATIONS)
def test_a_box_of_a_view_lies_on_the_same_pixels_of_the_image(way):
    image = torch.zeros(3, 20, 30)
    image[:, 4:9, 11:25] = 1
    seen = way.seen(image)
    assert tuple(seen.shape[1:]) == way.size((20, 30))
    rows, columns = seen[0].any(1).nonzero(), seen[0].any(0).nonzero()
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    assert way.back(found([box], [1.0]), (20, 30)).boxes_xyxy.tolist() == [[11, 4, 25, 9]]


def test_the_eight_ways_differ():
    image = torch.arange(12).view(1, 3, 4)
    assert len({str(way.seen(image).tolist()) for way in ORIENTATIONS}) == 8
    assert torch.equal(orientations(1)[0].seen(image), image)
    with pytest.raises(ValueError, match="tta_views is 3; it must be 1 "):
        orientations(3)


@pytest.mark.parametrize("way", ORIENTATIONS)
def test_images_of_a_batch_are_turned_without_their_padding(way):
    images = [torch.rand(3, 20, 30), torch.rand(3, 32, 16)]
    batch = Batch.from_images(images, original_sizes=[(40, 60), (64, 32)], pad_to=(32, 40))
    seen = seen_batch(batch, [way])
    expected = Batch.from_images([way.seen(image) for image in images], pad_to=way.size((32, 40)))
    assert torch.equal(seen.images, expected.images)
    assert seen.image_sizes == expected.image_sizes
    assert seen.original_sizes == tuple(way.size(size) for size in batch.original_sizes)


def test_views_are_seen_together_where_they_have_one_shape_and_are_not_too_large():
    batch = Batch.from_images([torch.rand(3, 20, 30), torch.rand(3, 16, 12)])
    seen = seen_batch(batch, ORIENTATIONS[4:])
    assert seen.images.shape == (8, 3, 30, 20) and seen.image_ids == (0, 1) * 4
    for place, way in enumerate(ORIENTATIONS[4:]):
        assert torch.equal(seen.images[2 * place : 2 * place + 2], seen_batch(batch, [way]).images)

    def sizes(*shape, **options):
        groups = orientation_groups(8, shape, **options)
        assert [way for group in groups for way in group] == list(ORIENTATIONS)
        return [len(group) for group in groups]

    assert sizes(2, 3, 20, 30) == [4, 4]
    assert sizes(2, 3, 20, 30, first_alone=True) == [1, 3, 4]
    assert sizes(1, 3, 800, 1333) == [2, 2, 2, 2]
    assert sizes(4, 3, 800, 1333) == [1] * 8


def test_what_views_agree_on_is_one_object_and_what_one_has_missed_counts_less():
    views = [
        found([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.8]),
        found([[1, 0, 11, 10]], [0.6]),
        found([[0, 0, 10, 13], [50, 50, 60, 61]], [0.6, 0.4]),
    ]
    fused = fuse(views)
    assert fused.boxes_xyxy.tolist() == [[0, 0, 10, 10], [50, 50, 60, 60.5]]
    assert fused.scores.tolist() == pytest.approx([0.7, 0.4])


def test_labels_and_boxes_of_one_view_are_not_fused():
    two = found([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9]], [0.9, 0.8, 0.7], [0, 1, 0])
    fused = fuse([two, two])
    assert fused.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert fused.labels.tolist() == [0, 1, 0]
    assert len(fuse([two, two], nms_iou_threshold=0.95)) == 2
    assert len(fuse([two, two], max_detections=1)) == 1


def test_views_may_be_empty():
    none = found([], [])
    assert len(fuse([none, none])) == 0
    assert fuse([none, found([[0, 0, 4, 4]], [0.8], [3])]).scores.tolist() == pytest.approx([0.4])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 12), st.sampled_from([2, 4, 8]))
def test_fusing_equal_views_changes_nothing_and_their_order_does_not_count(seed, count, number):
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 4, generator=random) * 50
    boxes = torch.cat((corners[:, :2], corners[:, :2] + corners[:, 2:] + 1), dim=1)
    scores = torch.rand(count, generator=random).add(0.01).sort(descending=True).values
    one = Detections(boxes, scores, torch.randint(0, 2, (count,), generator=random))
    fused = fuse([one] * number)
    torch.testing.assert_close(fused.boxes_xyxy, one.boxes_xyxy)
    torch.testing.assert_close(fused.scores, one.scores)
    assert fused.labels.tolist() == one.labels.tolist()
    other = Detections(boxes * 1.02, scores.flip(0).sort(descending=True).values * 0.7, one.labels)
    first, second = fuse([one, other, one]), fuse([other, one, one])
    torch.testing.assert_close(first.scores, second.scores)
    torch.testing.assert_close(first.boxes_xyxy, second.boxes_xyxy)


@pytest.mark.parametrize("changes", [{}, {"stretch_to": 64, "nms_iou_threshold": 0.7}])
def test_with_eight_views_a_turned_image_has_the_same_detections(tmp_path, changes):
    """The views of an image and of the same turned are the same eight."""
    detector = load_detector(save_tiny(tmp_path / "m.ckpt", **changes), "cpu")
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 80), dtype=np.uint8))
    (expected,) = detector.detect([pixels], threshold=0.0, tta_views=8)
    assert len(expected) > 3
    for way in ORIENTATIONS[1:]:
        (seen,) = detector.detect([way.seen(pixels)], threshold=0.0, tta_views=8)
        again = way.back(seen, (64, 80))
        torch.testing.assert_close(again.scores, expected.scores, atol=2e-3, rtol=0)
        torch.testing.assert_close(again.boxes_xyxy, expected.boxes_xyxy, atol=0.2, rtol=0)
    (alone,) = detector.detect([pixels], threshold=0.0)
    assert alone.scores.tolist() != expected.scores.tolist()


def test_the_number_is_stored_and_a_server_without_lightning_has_it(tmp_path):
    path = save_tiny(tmp_path / "m.ckpt", tta_views=4)
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 70, 90), dtype=np.uint8))
    detector, plain = load_detector(path, "cpu"), load_plain_model(path)
    (expected,) = detector.detect([pixels], threshold=0.0)
    (given_,) = detector.detect([pixels], threshold=0.0, tta_views=4)
    (served,) = plain.detect([pixels], threshold=0.0)
    for other in (given_, served):
        assert torch.equal(other.boxes_xyxy, expected.boxes_xyxy) and torch.equal(other.scores, expected.scores)
    (one,) = plain.detect([pixels], threshold=0.0, tta_views=1)
    assert not torch.equal(one.scores[:4], expected.scores[:4])
    with pytest.raises(ValueError, match="tta_views is 5"):
        detector.detect([pixels], tta_views=5)
    with pytest.raises(ValueError, match="tta_views is 0"):
        tiny_module(tta_views=0)


def test_training_validates_images_as_they_are_and_the_test_sees_all_views(rooms):
    data = CocoDataModule(root=str(rooms), batch_size=2, val_batch_size=2, image_size=64, max_size=96, num_workers=0)
    module = tiny_module(data.num_classes, tta_views=4)
    seen = []  # images, by the batches that the model has had in evaluation mode
    module.model.register_forward_pre_hook(lambda model, given: None if model.training else seen.append(len(given[0])))
    trainer = lightning.Trainer(max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0, **QUIET)
    trainer.fit(module, datamodule=data)
    assert sum(seen) == 4
    trainer.validate(module, datamodule=data, verbose=False)
    assert sum(seen) == 4 + 4 * 4
    seen.clear()
    predicted = trainer.predict(module, datamodule=data)
    assert sum(seen) == 4 * 4
    expected = module.detect([rooms / "val" / "images" / "000001.png"], threshold=0.0)[0]
    torch.testing.assert_close(predicted[0][0].scores, expected.scores, atol=1e-4, rtol=0)


def test_predict_sees_as_many_views_as_it_is_told(rooms, tmp_path, capsys):
    path, picture = save_tiny(tmp_path / "m.ckpt"), rooms / "val" / "images" / "000001.png"
    given_ = ["--ckpt_path", path, "--images", picture, "--output", tmp_path / "found", "--num_workers", 0]
    arguments = ["predict", *map(str, given_), "--trainer.accelerator", "cpu", "--threshold", "0.0"]
    assert run([*arguments, "--tta_views", "8"]) == 0
    rows = (tmp_path / "found" / "predictions.csv").read_text().splitlines()[1:]
    (expected,) = load_detector(path, "cpu").detect([picture], threshold=0.0, tta_views=8)
    assert len(rows) == len(expected) > 0
    capsys.readouterr()
    assert run(arguments) == 1
    assert "holds results with other settings (tta_views" in capsys.readouterr().err
    assert run([*arguments, "--tta_views", "6"]) == 2
    assert "error: --tta_views is 6; it must be 1" in capsys.readouterr().err


def test_weights_bring_their_views_and_suppression_to_an_evaluation(rooms, tmp_path, monkeypatch):
    """What makes detections of the model's output is that of the weights, unless an option says otherwise."""
    seen = []
    monkeypatch.setattr(
        "dino_lightning.training.evaluated_module.detections_of_views",
        lambda model, batch, settings, views, output: (
            seen.append((views, settings["nms_iou_threshold"])) or [found([], []) for _ in batch.image_sizes]
        ),
    )
    path = save_tiny(tmp_path / "m.ckpt", num_classes=1, class_names=["room"], category_ids=[1], tta_views=2,
                     nms_iou_threshold=0.6)  # fmt: skip
    sizes = [each for each in TINY_ARGS if "model" not in each]
    for more, expected in (([], (2, 0.6)), (["--model.tta_views=1", "--model.nms_iou_threshold=null"], (1, None))):
        seen.clear()
        options = ["--data.root", str(rooms), "--model.weights", str(path), "--run_dir", str(tmp_path / "out"), *more]
        assert run(["validate", *options, *sizes, "--report", "false"]) == 0
        assert set(seen) == {expected}


def test_fit_ends_with_the_best_epoch_seen_in_all_views(rooms, tmp_path, capsys):
    """The values that are printed are those of `validate`; the checkpoint has the threshold that belongs to them."""
    options = ["fit", "--config", "small_cpu", "--data.root", str(rooms), "--run_dir", str(tmp_path / "run")]
    quick = ["--data.fixed_size=160", "--data.num_workers=0", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert run([*options, *quick, "--model.tta_views=2"]) == 0
    printed = capsys.readouterr().out
    said = re.search(r"with 2 views of each image .* AP ([0-9.]+), .* F1 ([0-9.]+) .* of ([0-9.]+), which", printed)
    assert said, printed
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    stored = torch.load(best, weights_only=True)["score_threshold"]
    assert f"{stored:.3f}" == said[3]
    assert run(["validate", "--ckpt_path", str(best), "--trainer.accelerator", "cpu"]) == 0
    table = capsys.readouterr().out
    assert f"best F1 on these images: {said[2]}, at {said[3]}" in table
    assert re.search(rf"val/AP +{said[1]}", table)


def test_a_limit_of_the_validation_holds_at_the_end_too(rooms, tmp_path, monkeypatch):
    seen, real = [], DINOModule.detect_batch

    def counted(module, batch, **given):
        if not given:  # all views of the module
            seen.append(len(batch))
        return real(module, batch, **given)

    monkeypatch.setattr(DINOModule, "detect_batch", counted)
    options = ["fit", *TINY_ARGS, "--data.root", str(rooms), "--run_dir", str(tmp_path / "run"), "--model.tta_views=2"]
    assert run([*options, "--trainer.max_epochs=1", "--data.val_batch_size=1", "--trainer.limit_val_batches=1"]) == 0
    assert sum(seen) == 1
