"""Other detectors from PyPI to compare with; their weights are random, which does not change the times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dino_lightning.structures import Batch

CLASSES, BOXES = 80, 8
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast, by the precision of a step


def random_batch(height: int, width: int, size: int, device: str) -> Batch:
    """A batch of noise images with random boxes."""
    generator = torch.Generator().manual_seed(height * width + size)
    images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator) for _ in range(size)]
    targets = []
    for _ in range(size):
        centre, extent = (
            torch.rand(BOXES, 2, generator=generator) * 0.6 + 0.2,
            torch.rand(BOXES, 2, generator=generator),
        )
        boxes = torch.cat((centre, extent * 0.3 + 0.02), dim=1)
        targets.append((boxes, torch.randint(CLASSES, (BOXES,), generator=generator)))
    return Batch.from_images(images, targets=targets).to(device)


def transformers_step(height: int, width: int, size: int, device: str, precision: str = "fp32") -> Callable[[], None]:
    """A training step of transformers' Deformable DETR in the size of DINO."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        num_queries=900,
        two_stage=True,
        two_stage_num_proposals=900,
        with_box_refine=True,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        num_labels=CLASSES,
    )
    model = DeformableDetrForObjectDetection(config).train().to(device)
    for name, parameter in model.named_parameters():  # as in DINO: stem and first stage are fixed
        if "backbone" in name and ("embedder" in name or "stages.0" in name):
            parameter.requires_grad_(False)
    pixels, labels = _normalised(height, width, size, device, "class_labels")
    return _step(model, lambda: model(pixel_values=pixels, labels=labels).loss, device, precision)


def rfdetr_base(device: str) -> Any:
    """RF-DETR base with random weights; nothing is downloaded."""
    from rfdetr import RFDETRBase
    from transformers import PreTrainedModel

    def bare(cls: Any, *_: Any, config: Any = None, **__: Any) -> Any:
        return cls(config)

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(bare)):
        return RFDETRBase(pretrain_weights=None, num_classes=CLASSES, device=device)


def rfdetr_step(height: int, width: int, size: int, device: str, precision: str = "fp32") -> Callable[[], None]:
    """A training step of RF-DETR base."""
    from rfdetr.config import TrainConfig
    from rfdetr.models import build_criterion_from_config

    if height % 56 or width % 56:
        raise SystemExit(f"RF-DETR takes sides that are multiples of 56, not {height} x {width}.")
    torch.manual_seed(0)
    detector = rfdetr_base(device)
    model = detector.model.model.train()
    # it asks for a dataset, which nothing here reads
    criterion, _ = build_criterion_from_config(detector.model_config, TrainConfig(dataset_dir="."))
    criterion = criterion.to(device).train()
    pixels, targets = _normalised(height, width, size, device, "labels")

    def loss() -> Tensor:
        terms = criterion(model(pixels), targets)
        return sum(terms[name] * weight for name, weight in criterion.weight_dict.items() if name in terms)

    return _step(model, loss, device, precision)


def _normalised(height: int, width: int, size: int, device: str, labels: str) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Normalised pixels and targets of a batch, with labels under the peer's name."""
    batch = random_batch(height, width, size, device)
    assert batch.targets is not None
    targets = [
        {labels: batch.targets.labels[index], "boxes": batch.targets.boxes_cxcywh[index]} for index in range(size)
    ]
    return (batch.images.float() - 118) / 58, targets


def _step(model: nn.Module, loss: Callable[[], Tensor], device: str, precision: str) -> Callable[[], None]:
    """Run one step: forward, backward, gradient clipping and optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    dtype = DTYPES[precision]

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype is not None):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return step
