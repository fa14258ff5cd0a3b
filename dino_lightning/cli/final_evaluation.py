"""The best checkpoint of a training with test-time augmentation, evaluated as it will be used, at the end of `fit`."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from tqdm import tqdm

from dino_lightning.console import bar_seconds
from dino_lightning.data import CocoDataModule
from dino_lightning.files import atomic_write
from dino_lightning.metrics import CocoMetric
from dino_lightning.training.detection import on_host
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.reading import read_checkpoint

ROUNDING = 1e-5  # of scores in other batches, which must not take out the detection that the threshold is of
MOST_VIEWS = 8_000  # of all images: beyond, the user decides when to evaluate


def evaluate_with_views(trainer: Trainer, module: DINOModule, data: CocoDataModule, checkpoint: Path) -> str | None:
    """Evaluate a checkpoint on the validation images with all views, and store the threshold of the best F1 with them.

    Validation while training sees images as they are. Nothing is evaluated where the module sees one view of each, and
    where several processes trained or the views of all images are more than `MOST_VIEWS`.

    Args:
        trainer: that of the training, which has ended.
        module: as trained; it has its own weights again afterwards.
        data: of the training.
        checkpoint: its best one, which may be missing.

    Returns:
        What came out, or how to have it, as text; None for a single view or no checkpoint.
    """
    views = module.hparams["tta_views"]
    if views == 1 or not checkpoint.is_file():
        return None
    if trainer.world_size > 1 or len(data.val_set) * views > MOST_VIEWS:
        return f"These values are of images as they are. validate sees {views} views of each (tta_views)."
    content, own = read_checkpoint(checkpoint), {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(content["state_dict"])
    try:
        values = _evaluated(trainer, module.eval(), data)
    finally:
        module.load_state_dict(own)
    if values["F1"] <= 0:
        return None
    content["score_threshold"] = max(0.0, values["F1_threshold"] - ROUNDING)
    with atomic_write(checkpoint) as temporary:
        torch.save(content, temporary)
    return (
        f"The best epoch, with {views} views of each image (tta_views) as predict and test see it: "
        f"AP {values['AP']:.3f}, AP50 {values['AP50']:.3f}, F1 {values['F1']:.3f} with precision "
        f"{values['F1_precision']:.3f} and recall {values['F1_recall']:.3f}, at a score threshold of "
        f"{values['F1_threshold']:.3f}, which {checkpoint.name} has from now on."
    )


@torch.no_grad()
def _evaluated(trainer: Trainer, module: DINOModule, data: CocoDataModule) -> dict[str, float]:
    metric, module = CocoMetric(), module.to(trainer.strategy.root_device)
    most = trainer.num_val_batches[0] if trainer.num_val_batches else None  # of limit_val_batches
    with tqdm(
        desc="Best epoch, all views",
        total=len(data.val_set),
        unit="image",
        mininterval=bar_seconds(),
        disable=trainer.progress_bar_callback is None,
    ) as progress:
        for batch in islice(data.val_dataloader(), None if most is None or math.isinf(most) else int(most)):
            with trainer.precision_plugin.forward_context():
                found = on_host(module.detect_batch(batch.to(module.device)), batch.image_ids)
            metric.update(found, batch.ground_truth, batch.image_ids)
            progress.update(len(batch))
    results: dict[str, float] = metric.compute()
    return results
