"""Shared fixtures: a small drawn dataset, tiny model sizes, every test as if it ran alone, on one thread."""

from __future__ import annotations

import os

import lightning.pytorch  # noqa: F401  # before pytest has a handler of logs, or messages are seen twice
import pytest
import torch
from PIL import Image

from dino_lightning.cli.run_folder import RUN_DIR_VARIABLE
from dino_lightning.floor_plans import write_rooms_dataset

# Some choice, so that no test leaves its process as large as it once was; see training/freed_memory.py.
os.environ.setdefault("MALLOC_ARENA_TEST", "8")

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


# What Lightning and the command line leave in the environment of the process that ran them.
LEFT_BY_A_RUN = (
    "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS", RUN_DIR_VARIABLE,
)  # fmt: skip


def forget_earlier_runs():
    """As a process that has run nothing; with one thread, for tests run side by side."""
    for name in LEFT_BY_A_RUN:
        os.environ.pop(name, None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(1)


def size_of(path):
    """(width, height) of an image file, which is closed again."""
    with Image.open(path) as image:
        return image.size


@pytest.fixture(autouse=True, scope="module")
def unlike_the_module_before():
    forget_earlier_runs()


@pytest.fixture(autouse=True)
def unlike_the_test_before():
    yield
    forget_earlier_runs()


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A real COCO dataset on disk: 8 training and 4 validation plans."""
    return write_rooms_dataset(tmp_path_factory.mktemp("rooms") / "plans", num_train=8, num_val=4, size=160)
