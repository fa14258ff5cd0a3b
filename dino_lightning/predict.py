"""From a checkpoint to a detector that is ready to use."""

from __future__ import annotations

from pathlib import Path

import torch

from dino_lightning.checkpoint import CheckpointError, read_checkpoint
from dino_lightning.module import DINOModule


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> DINOModule:
    """The detector of one of our checkpoints, in evaluation mode, with its classes, sizes and score threshold.

    Args:
        path: a checkpoint of a run, or the `model.ckpt` that a SageMaker job leaves.
        device: where to compute.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or "hyper_parameters" not in content or "state_dict" not in content:
        raise CheckpointError(
            f"{path} is not a checkpoint of dino_lightning; give a published one to --model.weights of a training run."
        )
    detector = DINOModule(**content["hyper_parameters"])
    detector.load_state_dict(content["state_dict"])
    detector.on_load_checkpoint(content)
    return detector.to(device).eval()
