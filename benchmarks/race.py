"""Our small config against other detectors on a dataset, for equal minutes: `python -m benchmarks race --data DIR`.

All contestants have the same images in the same sizes, the same augmentation, cores, starting weights of the backbone
(MobileNetV2) and evaluation, and the same minutes of training, in which evaluation does not count. They run one after
another. How many epochs fit into the minutes is estimated from a few steps of each; the rate drops after 4/5 of them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from benchmarks.measure import environment, save, table
from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.boxes import normalized_cxcywh_to_xyxy
from dino_lightning.callbacks import EMA
from dino_lightning.cli.config_files import config_path
from dino_lightning.detections import Detections
from dino_lightning.files import save_figure
from dino_lightning.metrics import CocoMetric
from dino_lightning.model.backbone import Backbone
from dino_lightning.structures import Batch
from dino_lightning.weights.backbone_loading import start_backbone_from

CONTESTANTS = ("ours", "faster_rcnn", "ssdlite")
CHANNELS = 128  # of the other detectors' feature maps
PEER_RATE, PEER_WARMUP = 0.01, 100  # SGD's, and steps
PROBED_STEPS, PROBED_SHARE = 6, 0.1  # as many, but not more of the minutes
EVALUATIONS = 8
SHOWN = ("AP", "AP50", "F1")


@dataclass(frozen=True)
class Moment:
    """One evaluation: after how many minutes of training and steps, and what came out."""

    minutes: float
    step: int
    values: dict[str, float]


class Maps(nn.Module):
    """The backbone's maps and what follows them, by name, as torchvision's detectors want them."""

    def __init__(self, backbone: Backbone, head: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone, self.head, self.out_channels = backbone, head, channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> maps from fine to coarse."""
        maps = OrderedDict((str(level), image) for level, image in enumerate(self.backbone(images)))
        found: OrderedDict[str, Tensor] = self.head(maps)
        return found


class ExtraMaps(nn.Module):
    """Two more maps of half the size each, after the last one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, CHANNELS, 1),
                nn.ReLU6(),
                nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, padding=1),
                nn.ReLU6(),
            )
            for before in (channels, 2 * CHANNELS)
        )

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Append to the maps."""
        for step in self.steps:
            last = next(reversed(maps.values()))
            maps[str(len(maps))] = step(last)
        return maps


def faster_rcnn(backbone: Backbone, num_classes: int, side: int) -> nn.Module:
    """Faster R-CNN with a feature pyramid; anchors of 24 pixels and more at 320, in three proportions."""
    pyramid = FeaturePyramidNetwork(list(backbone.channels), CHANNELS, LastLevelMaxPool())
    levels = len(backbone.channels) + 1
    sizes = tuple((side * 24 // 320 * 2**level,) for level in range(levels))
    detector: nn.Module = FasterRCNN(
        Maps(backbone, pyramid, CHANNELS),
        num_classes + 1,
        min_size=side,
        max_size=side,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * levels),
        box_roi_pool=MultiScaleRoIAlign([str(level) for level in range(levels - 1)], 7, 2),
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_test=300,
        box_batch_size_per_image=128,
        box_score_thresh=0.02,
    )
    return detector


def ssdlite(backbone: Backbone, num_classes: int, side: int) -> nn.Module:
    """SSD with depthwise-separable heads on the backbone's maps and two more."""
    channels = [*backbone.channels, 2 * CHANNELS, 2 * CHANNELS]
    anchors = DefaultBoxGenerator([[2, 3] for _ in channels], min_ratio=0.07, max_ratio=0.95)
    head = SSDLiteHead(channels, anchors.num_anchors_per_location(), num_classes + 1, nn.BatchNorm2d)
    maps = Maps(backbone, ExtraMaps(backbone.channels[-1]), CHANNELS)
    detector: nn.Module = SSD(
        maps, anchors, (side, side), num_classes + 1, head=head, score_thresh=0.02, detections_per_img=100
    )
    return detector


class Peer(lightning.LightningModule):
    """One of torchvision's detectors on our batches and with our metric.

    Args:
        detector: takes and gives what torchvision's detection models do.
        max_epochs: the rate drops after 4/5 of them.
    """

    def __init__(self, detector: nn.Module, max_epochs: int) -> None:
        super().__init__()
        self.detector, self.max_epochs = detector, max_epochs
        self.metric = CocoMetric()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the detector's losses."""
        images, targets = _for_torchvision(batch)
        loss: Tensor = torch.stack(list(self.detector(images, targets).values())).sum()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Detections in pixels of the original images."""
        images, _ = _for_torchvision(batch)
        assert batch.ground_truth is not None
        found = []
        for output, image, size in zip(self.detector(images), images, batch.original_sizes, strict=True):
            scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
            found.append(Detections(output["boxes"] * scale, output["scores"], output["labels"] - 1))
        self.metric.update(found, batch.ground_truth, batch.image_ids)

    def on_validation_epoch_end(self) -> None:
        """Log what DINOModule logs."""
        for name, value in self.metric.compute().items():
            self.log(f"val/{name}", value)
        self.metric.reset()

    def configure_optimizers(self) -> Any:
        """SGD with momentum, as in torchvision's own training script."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=PEER_RATE, momentum=0.9, weight_decay=1e-4)
        drop = round(0.8 * self.max_epochs)

        def factor(step: int) -> float:
            return min((step + 1) / PEER_WARMUP, 1.0) * (0.1 if self.current_epoch >= drop else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Clock(lightning.Callback):
    """Sums the seconds of training, loading included and evaluation not; stops it when they are over.

    Args:
        limit: in seconds.
        kind: `wall`, or `cpu`: seconds that the process computed, over its threads.
    """

    def __init__(self, limit: float, kind: str) -> None:
        self.limit, self.kind, self.seconds, self.steps = limit, kind, 0.0, 0
        self.moments: list[Moment] = []
        self._since: float | None = None

    def _now(self) -> float:
        return time.perf_counter() if self.kind == "wall" else time.process_time() / torch.get_num_threads()

    def _pause(self) -> None:
        if self._since is not None:
            self.seconds += self._now() - self._since
            self._since = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Run on."""
        self._since = self._now() if self._since is None else self._since

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where the time is over; the evaluation at the end of the epoch follows."""
        self._pause()
        self._since = self._now()
        self.steps += 1
        if self.seconds >= self.limit:
            trainer.should_stop = True
            trainer.check_val_every_n_epoch = 1  # whichever epoch this is

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stand still."""
        self._pause()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note what came out."""
        values = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in SHOWN}
        self.moments.append(Moment(self.seconds / 60, trainer.global_step, values))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"  {self.seconds / 60:5.1f} min, step {trainer.global_step}: {shown}", flush=True)


def contestant(
    name: str, data: CocoDataModule, epochs: int, options: argparse.Namespace
) -> tuple[lightning.LightningModule, list[lightning.Callback], dict[str, Any]]:
    """The module of that name, its callbacks, and options of its Trainer."""
    model = {**options.settings["model"], "backbone_weights": options.backbone_weights}
    if name == "ours":
        own = {"weights": options.weights, "weights_for_rooms": options.weights_for_rooms, "recipe": "auto"}
        module = DINOModule(num_classes=data.num_classes, **{**model, **own})
        return module, [EMA(decay=None)], {}
    body = Backbone(
        name=model["backbone"],
        strides=(8, 16, 32),
        norm=model.get("backbone_norm", "frozen"),
        trainable_layers=model["trainable_backbone_layers"],
    )
    if options.backbone_weights is not None:
        holder = DINOModule(num_classes=data.num_classes, **model)
        start_backbone_from(holder.model, options.backbone_weights)
        body.load_state_dict(holder.model.backbone.state_dict())
    side = data.stretch_to or data.image_size
    detector = (faster_rcnn if name == "faster_rcnn" else ssdlite)(body, data.num_classes, side)
    return Peer(detector, epochs), [], {"gradient_clip_val": 10.0}


def race(name: str, options: argparse.Namespace) -> list[Moment]:
    """Train one contestant for the minutes; what each evaluation said.

    Args:
        name: of `CONTESTANTS`.
        options: those of the command line; `settings`, a configuration's; `weights_for_rooms`; and `evaluations`, how
            many there are in the minutes.
    """
    lightning.seed_everything(options.seed, verbose=False)
    config = options.settings

    def fit(epochs: int, clock: Clock, **more: Any) -> None:
        data = CocoDataModule(root=str(options.data), **{**config["data"], "num_workers": 0})
        module, callbacks, arguments = contestant(name, data, epochs, options)
        lightning.Trainer(
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            accelerator="cpu",
            callbacks=[*callbacks, clock],
            **arguments,
            **more,
        ).fit(module, data)

    limit = options.minutes * 60
    probe = Clock(limit * PROBED_SHARE, options.clock)
    fit(1, probe, limit_train_batches=PROBED_STEPS, limit_val_batches=0)
    data = CocoDataModule(root=str(options.data), **config["data"])
    steps, in_epoch = limit / (probe.seconds / probe.steps), max(data.images_per_epoch // data.batch_size, 1)
    epochs = math.ceil(steps / in_epoch)
    print(f"{name}: {steps:.0f} steps, {steps / in_epoch:.1f} epochs in {options.minutes:g} minutes", flush=True)
    clock = Clock(limit, options.clock)
    # a little less than all images in each epoch, so that whole epochs fill the minutes: rates and averages follow them
    part = min(in_epoch, max(1, round(steps / epochs)))
    fit(epochs, clock, check_val_every_n_epoch=max(1, epochs // options.evaluations), limit_train_batches=part)
    return clock.moments


def _for_torchvision(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images 0-1 without padding, and boxes in their pixels with labels from 1."""
    images, targets = [], []
    for index, (height, width) in enumerate(batch.image_sizes):
        images.append(batch.images[index, :, :height, :width].float() / 255)
        if batch.targets is not None:
            count = batch.targets.num_boxes[index]
            boxes = normalized_cxcywh_to_xyxy(batch.targets.boxes_cxcywh[index, :count], (height, width))
            real = (boxes[:, 2:] > boxes[:, :2]).all(1)
            targets.append({"boxes": boxes[real], "labels": batch.targets.labels[index, :count][real] + 1})
    return images, targets


def draw(results: dict[str, list[Moment]], path: Path) -> None:
    """AP, AP50 and F1 over the minutes, one panel each."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for name, moments in results.items():
            places = [moment.minutes for moment in moments]
            axes.plot(places, [moment.values[metric] for moment in moments], marker="o", markersize=3, label=name)
        axes.set(title=metric, xlabel="minutes of training", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    save_figure(figure, path)


def main() -> None:
    """Run the race, print a table and draw a picture; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks race", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a COCO-format dataset")
    add("--minutes", type=float, default=30.0, help="of training for each contestant")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time over threads, for a busy machine")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    add("--config", default="small_cpu.yaml", help="ours; the sizes, augmentation and batches of all")
    add("--backbone_weights", help="file or torchvision name; random if left out")
    add("--weights", help="starting weights of our whole detector")
    add("--seed", type=int, default=0)
    add("--picture", type=Path, default=Path("race.png"))
    add("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    options.settings = yaml.safe_load(config_path(options.config).read_text(encoding="utf-8"))
    options.weights_for_rooms, options.evaluations = None, EVALUATIONS
    results: dict[str, list[Moment]] = {}
    for name in options.contestants:
        results[name] = race(name, options)
        draw(results, options.picture)  # after each: a race takes long
        if options.output is not None:
            rows = {key: [vars(moment) for moment in moments] for key, moments in results.items()}
            save(options.output, {"environment": environment(), "results": rows})
    rows_shown: list[tuple[str, ...]] = [("contestant", "minutes", "steps", *SHOWN)]
    for name, moments in results.items():
        rows_shown += [
            (name, f"{m.minutes:.1f}", str(m.step), *(f"{m.values[metric]:.3f}" for metric in SHOWN)) for m in moments
        ]
    print(table(rows_shown))
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
