"""Shared fixtures: a small drawn dataset, tiny model sizes, one thread per test process."""

from __future__ import annotations

import pytest
import torch

from dino_lightning.data.rooms import write_rooms_dataset

TINY_SIZES = {
    "backbone": "resnet10",
    "backbone_norm": "group",
    "trainable_backbone_layers": 5,
    "feature_strides": [16, 32],
    "num_feature_levels": 2,
    "hidden_dim": 32,
    "num_heads": 4,
    "ffn_dim": 48,
    "num_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_queries": 12,
    "num_denoising": 50,
}
TINY_ARGS = [
    *(f"--model.{name}={value}" for name, value in TINY_SIZES.items()),
    "--model.backbone_weights=null",
    "--data.num_workers=0",
    "--data.image_size=64",
    "--data.max_size=96",
    "--data.augmentation=plans",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests run side by side; more threads than cores make each of them many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A real COCO dataset on disk: 8 training and 4 validation plans."""
    return write_rooms_dataset(tmp_path_factory.mktemp("rooms") / "plans", num_train=8, num_val=4, size=160)
