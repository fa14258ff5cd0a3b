"""DINOModule in other people's hands: their Trainer, their data, their images."""

import lightning
import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.memory import recursive_detach
from lightning_utilities.core.apply_func import apply_to_collection
from PIL import Image
from torch.utils.data import DataLoader

from dino_lightning import Batch, CocoDataModule, CocoMetric, DINOModule, load_detector
from dino_lightning.boxes import paired_iou
from dino_lightning.callbacks import PredictionImages
from dino_lightning.errors import NonFiniteError, UsageError
from dino_lightning.floor_plans import write_rooms_dataset
from tests.conftest import TINY_SIZES

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def tiny_module(num_classes=1, **changes):
    return DINOModule(num_classes=num_classes, **{"backbone_weights": None, **TINY_SIZES, **changes})


@pytest.fixture
def data(rooms):
    return CocoDataModule(root=str(rooms), batch_size=2, image_size=64, max_size=96, num_workers=0)


def test_readme_example(data, rooms, tmp_path):
    """Fit, detect in a file, save, load without the data module, detect the same."""
    lightning.seed_everything(1)
    model = tiny_module(data.num_classes)
    trainer = lightning.Trainer(max_epochs=1, precision="bf16-mixed", **QUIET)
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["val/AP"] >= 0
    plan = next((rooms / "val" / "images").iterdir())
    (found,) = model.detect([str(plan)], threshold=0.0)
    assert len(found) == 12
    assert found.names[0] == "room"
    assert found.category_ids == (1,)
    assert (found.scores.diff() <= 0).all()

    trainer.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    loaded = DINOModule.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")
    assert loaded.hparams["class_names"] == ["room"]
    assert loaded.hparams["image_size"] == 64
    (again,) = loaded.detect([plan], threshold=0.0)
    torch.testing.assert_close(again.boxes_xyxy, found.boxes_xyxy)
    assert loaded.score_threshold == model.score_threshold


def test_detect_takes_any_kind_of_image_and_gives_its_own_pixels(tmp_path):
    model = tiny_module()
    array = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [str(tmp_path / "image.png"), tmp_path / "image.png", Image.fromarray(array), array, tensor, tensor / 255]
    results = model.detect(kinds, threshold=0.0, image_size=48, max_size=96)
    for found in results[1:]:
        torch.testing.assert_close(found.boxes_xyxy, results[0].boxes_xyxy)
    (large,) = model.detect([np.repeat(np.repeat(array, 2, 0), 2, 1)], threshold=0.0, image_size=48, max_size=96)
    assert large.boxes_xyxy.max() > 1.5 * results[0].boxes_xyxy.max()
    grey = model.detect([array[:, :, 0]], threshold=1.0)
    assert len(grey[0]) == 0
    assert model.training  # as it was before
    with pytest.raises(ValueError, match="does not exist"):
        model.detect(["nowhere.png"])
    with pytest.raises(ValueError, match="Expected an RGB image"):
        model.detect([np.zeros((4, 4, 7), dtype=np.uint8)])


def test_predictions_know_their_images(data, rooms):
    """`Trainer.predict`, on the test split or else on the validation split."""
    predictions = lightning.Trainer(**QUIET).predict(tiny_module(data.num_classes), datamodule=data)
    found = [detections for batch in predictions for detections in batch]
    assert [detections.image_id for detections in found] == [image.id for image in data.val_set.annotations.images]
    assert {entry["image_id"] for entry in found[0].to_coco()} == {found[0].image_id}
    assert repr(found[1]).startswith(f"12 detections in image {found[1].image_id}\n")
    with pytest.raises(ValueError, match=r"to_coco\(image_id\)"):
        tiny_module().detect([rooms / "val" / "images" / "000001.png"])[0].to_coco()


def test_batches_and_detections_pass_through_lightnings_functions(data):
    batch = next(iter(data.val_dataloader()))
    (found,) = tiny_module(data.num_classes).eval()(batch)
    moved = move_data_to_device({"batch": batch, "found": [found, "text"]}, torch.device("cpu"))
    assert moved["found"][0].boxes_xyxy.equal(found.boxes_xyxy) and moved["batch"].images.equal(batch.images)
    converted = apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.double())
    assert isinstance(converted, Batch) and converted.targets.boxes_cxcywh.dtype == torch.float64
    assert converted.ground_truth[0].boxes_xyxy is batch.ground_truth[0].boxes_xyxy
    assert not recursive_detach({"found": found})["found"].scores.requires_grad


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_of_all_weights_is_refused_by_name(data, precision):
    with pytest.raises(UsageError, match=rf"precision {precision} is not possible: .*Use 32-true, bf16-mixed or"):
        lightning.Trainer(precision=precision, **QUIET).validate(tiny_module(data.num_classes), data)


class TwoLoaders(CocoDataModule):
    """Validates on its own images, and on those of another dataset."""

    other = None

    def val_dataloader(self):
        return [super().val_dataloader(), self.other.val_dataloader()]


def test_each_of_two_validation_loaders_has_its_metrics(rooms, tmp_path):
    others = write_rooms_dataset(tmp_path / "others", num_train=2, num_val=3, size=128, seed=5)
    sizes = {"image_size": 64, "max_size": 96, "num_workers": 0}
    both = TwoLoaders(root=str(rooms), **sizes)
    alone, both.other = (CocoDataModule(root=str(root), **sizes) for root in (rooms, others))
    module = tiny_module(both.num_classes)
    sheet = PredictionImages(path=str(tmp_path / "sheet.png"))
    trainer = lightning.Trainer(callbacks=[sheet], **QUIET)
    trainer.validate(module, both, verbose=False)
    results, threshold = dict(trainer.callback_metrics), module.score_threshold
    assert len(module.evaluation.images) == 4 and (tmp_path / "sheet.png").exists()
    for suffix, data in (("/dataloader_idx_1", both.other), ("", alone)):
        trainer = lightning.Trainer(**QUIET)
        trainer.validate(module, data, verbose=False)
        for name, value in trainer.callback_metrics.items():
            assert results.pop(name + suffix) == value, name
    assert results == {} and module.score_threshold == threshold


class TorchvisionData(lightning.LightningDataModule):
    """Somebody's own data module, in torchvision's detection convention."""

    def __init__(self, labels):
        super().__init__()
        self.labels = labels

    def samples(self):
        generator = torch.Generator().manual_seed(0)
        for index, label in enumerate(self.labels):
            target = {
                "boxes": torch.tensor([[4.0, 4, 40, 50]]),
                "labels": torch.tensor([label]),
                "image_id": torch.tensor(100 + index),
            }
            yield torch.rand(3, 64, 64, generator=generator), target

    def loader(self):
        return DataLoader(list(self.samples()), batch_size=2, collate_fn=self.collate)

    def collate(self, samples):
        images, targets = zip(*samples, strict=True)
        return Batch.from_torchvision(images, targets)

    train_dataloader = val_dataloader = loader


def test_own_data_module():
    model = tiny_module(num_classes=2, class_names=["door", "room"])
    trainer = lightning.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, datamodule=TorchvisionData([1, 2, 2, 1]))
    assert {"val/AP_class/door", "val/AP_class/room", "val/F1"} <= set(trainer.callback_metrics)


def test_a_label_without_a_class_is_named():
    with pytest.raises(ValueError, match=r"image ids \[102, 103\] has label 2; the model has 2 classes"):
        lightning.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET).fit(
            tiny_module(num_classes=2), datamodule=TorchvisionData([1, 2, 3, 1])
        )


def test_an_unknown_argument_fails_and_lists_those_there_are():
    with pytest.raises(TypeError, match=r"no argument hiden_dim; .*hidden_dim"):
        tiny_module(hiden_dim=64)


def test_another_class_count_than_the_data_is_refused(data):
    with pytest.raises(ValueError, match=r"num_classes=data\.num_classes"):
        lightning.Trainer(max_epochs=1, **QUIET).fit(tiny_module(num_classes=4), datamodule=data)


def test_predictions_that_are_not_finite_stop_with_the_image_ids(data):
    model = tiny_module(max_non_finite_steps=0)
    with torch.no_grad():
        model.model.decoder.class_head.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"image ids \[\d+, \d+\] are not finite") as caught:
        lightning.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET).fit(model, datamodule=data)
    assert len(caught.value.image_ids) == 2


class Recorder(lightning.Callback):
    def __init__(self):
        self.rates, self.norms = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        squares = [p.grad.square().sum() for p in pl_module.parameters() if p.grad is not None]
        if squares:
            self.norms.append(torch.stack(squares).sum().sqrt().item())


def run_epochs(data, trainer_options, **changes):
    recorder = Recorder()
    options = {**QUIET, "limit_val_batches": 0, "limit_train_batches": 1, **trainer_options}
    lightning.Trainer(callbacks=[recorder], **options).fit(tiny_module(**changes), datamodule=data)
    return recorder


def test_the_recipe_drops_rates_and_clips(data):
    recorder = run_epochs(data, {"max_epochs": 4}, lr_drop_epochs=[2], lr=1e-3, backbone_lr=1e-4)
    expected = [[1e-3, 1e-4]] * 2 + [[1e-4, 1e-5]] * 2
    assert recorder.rates == [pytest.approx(rates) for rates in expected]
    assert all(norm <= 0.1001 for norm in recorder.norms)


def test_rates_drop_once_near_the_end_by_default(data):
    rates = [rate for rate, _ in run_epochs(data, {"max_epochs": 12}).rates]
    assert rates == pytest.approx([1e-4] * 11 + [1e-5])


def test_the_trainers_own_clipping_wins(data):
    recorder = run_epochs(data, {"max_epochs": 3, "gradient_clip_val": 0.5})
    assert recorder.norms[-1] == pytest.approx(0.5, rel=1e-3)
    free = run_epochs(data, {"max_epochs": 3}, clip_grad_norm=0.0)
    assert free.norms[-1] > 0.5


def test_the_metric_is_reusable_without_the_module(data):
    """Perfect detections score one."""
    metric = CocoMetric(class_names=["room"])
    from dino_lightning import Detections

    for batch in data.val_dataloader():
        found = [
            Detections(
                boxes_xyxy=torch.from_numpy(truth.boxes_xyxy).float(),
                scores=torch.full((len(truth.labels),), 0.9),
                labels=torch.from_numpy(truth.labels),
            )
            for truth in batch.ground_truth
        ]
        metric.update(found, batch.ground_truth, batch.image_ids)
    results = metric.compute()
    assert results["AP"] == pytest.approx(1.0)
    assert results["F1"] == pytest.approx(1.0)


def test_stretched_images_are_detected_in_their_own_pixels(rooms, tmp_path):
    """`detect` sees what evaluation sees: the same square, and boxes go back to the proportions of the file."""
    data = CocoDataModule(root=str(rooms), fixed_size=64, fixed_size_mode="stretch", num_workers=0, val_batch_size=1)
    module = tiny_module(data.num_classes)
    trainer = lightning.Trainer(default_root_dir=tmp_path, **QUIET)
    trainer.validate(module, data, verbose=False)
    assert module.hparams["stretch_to"] == 64
    batch = next(iter(data.val_dataloader()))
    assert batch.images.shape[-2:] == (64, 64) and batch.image_sizes == ((64, 64),)
    entry = data.val_set.annotations.images[0]
    assert entry.size[0] != entry.size[1]
    with torch.no_grad():
        expected = module.eval()(batch)[0]
    found = module.detect([data.val_set.annotations.image_path(0)], threshold=0.0)[0]
    torch.testing.assert_close(found.boxes_xyxy, expected.boxes_xyxy)
    torch.testing.assert_close(found.scores, expected.scores)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = load_detector(tmp_path / "a.ckpt").detect([data.val_set.annotations.image_path(0)], threshold=0.0)[0]
    torch.testing.assert_close(again.boxes_xyxy, expected.boxes_xyxy)


def test_non_maximum_suppression_keeps_the_best_of_boxes_that_overlap():
    model = tiny_module(num_queries=80)
    image = torch.randint(0, 256, (3, 90, 140), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (every,) = model.detect([image], threshold=0.0)
    other = tiny_module(num_queries=80, nms_iou_threshold=0.2)
    other.load_state_dict(model.state_dict())
    (found,) = other.detect([image], threshold=0.0)
    overlap = paired_iou(found.boxes_xyxy[:, None], found.boxes_xyxy[None]).fill_diagonal_(0)
    assert 0 < len(found) < len(every) and float(overlap.max()) <= 0.2
    best = paired_iou(every.boxes_xyxy[:, None], found.boxes_xyxy[None])
    assert bool((best > 0.2).any(1).all())  # what is gone overlaps with something that stayed


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5])
def test_a_threshold_of_non_maximum_suppression_that_cannot_be_is_refused(threshold):
    with pytest.raises(ValueError, match=r"nms_iou_threshold is .* above 0 and at most 1"):
        tiny_module(nms_iou_threshold=threshold)
