"""Detectors of torchvision on our backbones, batches and metric, for `python -m benchmarks race` and `ladder`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dino_lightning.boxes import normalized_cxcywh_to_xyxy
from dino_lightning.detections import Detections
from dino_lightning.metrics import CocoMetric
from dino_lightning.model.backbone import Backbone
from dino_lightning.structures import Batch
from dino_lightning.training.test_time_augmentation import detect_in_views

CHANNELS = 128  # of the feature maps
PEER_RATE, PEER_WARMUP = 0.01, 100  # SGD's, and steps


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
        tta_views: in how many ways `validate` sees an image; while training it is seen as it is.
    """

    def __init__(self, detector: nn.Module, max_epochs: int, tta_views: int = 1) -> None:
        super().__init__()
        self.detector, self.max_epochs, self.tta_views = detector, max_epochs, tta_views
        self.metric = CocoMetric()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the detector's losses."""
        images, targets = _for_torchvision(batch)
        loss: Tensor = torch.stack(list(self.detector(images, targets).values())).sum()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Detect as `DINOModule` does: in one view while training, in all of them afterwards."""
        assert batch.ground_truth is not None
        views = 1 if self.trainer.state.fn == TrainerFn.FITTING else self.tta_views
        self.metric.update(detect_in_views(self.detect, batch, views), batch.ground_truth, batch.image_ids)

    def detect(self, batch: Batch) -> list[Detections]:
        """Detections in pixels of the original images."""
        images, _ = _for_torchvision(batch)
        found = []
        for output, image, size in zip(self.detector(images), images, batch.original_sizes, strict=True):
            scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
            found.append(Detections(output["boxes"] * scale, output["scores"], output["labels"] - 1))
        return found

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
