"""Trains on twelve drawn images of one size, in batches and on processes as asked for, and writes what came out.

Run as a program by tests/training/test_accumulation.py where there are two processes, with the options as JSON.
"""

import json
import os
import sys

import lightning
import torch
from torch.utils.data import DataLoader

from dino_lightning import Batch, DINOModule
from dino_lightning.callbacks import EMA
from dino_lightning.model.denoising import Noise
from tests.conftest import TINY_SIZES

GROUPS = 3
CLASSES = 3


class WithSGD(DINOModule):
    """Adam divides tiny gradients by themselves, and so rounding by rounding."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Gradients(lightning.Callback):
    """The gradients of each step as the optimizer sees them, and the losses as they are logged."""

    def __init__(self):
        self.steps, self.losses = [], []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.steps.append(self.gradients(pl_module)))

    def gradients(self, module):
        return {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(pl_module.step_metrics.of_step()["train/loss_step"])


def draw(index, count):
    generator = torch.Generator().manual_seed(100 + index)
    centre = torch.rand(count, 2, generator=generator) * 0.5 + 0.25
    boxes = torch.cat((centre, torch.rand(count, 2, generator=generator) * 0.3 + 0.1), dim=1)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
    return index, image, (boxes, torch.randint(0, CLASSES, (count,), generator=generator))


def collate(samples):
    return Batch.from_images(
        [image for _, image, _ in samples],
        targets=[target for *_, target in samples],
        image_ids=[index for index, *_ in samples],
    )


def noise_of(model, args, kwargs):
    """The same noise for an image, whatever batch it is in."""
    batch = args[0]
    draws = []
    for index in batch.image_ids:
        generator = torch.Generator().manual_seed(index)
        boxes = batch.targets.labels.shape[1]
        draws.append(
            (
                torch.rand(2 * GROUPS, boxes, generator=generator),
                torch.randint(CLASSES, (2 * GROUPS, boxes), generator=generator),
                torch.randint(2, (2 * GROUPS, boxes, 4), generator=generator).float() * 2 - 1,
                torch.rand(2 * GROUPS, boxes, 4, generator=generator),
            )
        )
    return args, {"noise": Noise(*(torch.stack(values, dim=1) for values in zip(*draws, strict=True)))}


def train(*, counts, batch_size, accumulate=1, devices=1, denoising=0, clip=0.0, ema=False, freeze=(), adam=False):
    """Gradients and weights after an epoch without shuffling."""
    torch.set_num_threads(1)
    lightning.seed_everything(3, verbose=False)
    samples = [draw(index, count) for index, count in enumerate(counts)]
    rank = int(os.environ.get("LOCAL_RANK", 0))
    # rank r sees every other image; Lightning's own sampler would shuffle
    loader = DataLoader(samples[rank::devices], batch_size=batch_size, collate_fn=collate)
    options = {
        **TINY_SIZES,
        "num_queries": 6,
        "num_denoising": denoising,
        "clip_grad_norm": clip,
        "freeze": list(freeze),
    }
    module = (DINOModule if adam else WithSGD)(num_classes=CLASSES, backbone_weights=None, **options)
    if denoising:
        module.model.register_forward_pre_hook(noise_of, with_kwargs=True)
    gradients = Gradients()
    average = EMA(decay=0.9, tau=2.0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[gradients, average] if ema else [gradients],
    )
    trainer.fit(module, train_dataloaders=loader)
    return {"steps": gradients.steps, "losses": gradients.losses, "state": module.model.state_dict()}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    out = given.pop("out")
    result = train(**given)
    torch.save(result, f"{out}.{os.environ.get('LOCAL_RANK', 0)}")
