"""Weights that come with this package: detectors trained on drawn floor plans, from random weights.

`python -m benchmarks pretrain` makes them. They hold 16-bit numbers and are checked before they are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_lightning.errors import CheckpointError
from dino_lightning.files import atomic_write

FOLDER = Path(__file__).parent / "files"
ROOM_WORDS = ("room", "rooms", "bedroom", "kitchen", "bathroom", "hallway", "livingroom", "living room")


@dataclass(frozen=True)
class ShippedWeights:
    """A file in this package.

    Attributes:
        file: its name in `FOLDER`.
        sha256: of its content.
        about: what it is, in one sentence.
    """

    file: str
    sha256: str
    about: str


SHIPPED = {
    "rooms_small": ShippedWeights(
        "rooms_small.pt",
        "ea4a71ec2b2c48c5d3066cfc333ecb4566624ce7e6c0a984a246097d51b8b8c6",
        "finds rooms on floor plans; the architecture of configs/small_cpu.yaml at 416 x 416 pixels",
    ),
}


def shipped_file(name: str | Path) -> Path | None:
    """The file of weights that come with this package, or None where there are none of that name.

    Raises:
        CheckpointError: the file is missing or is not the one that was shipped.
    """
    shipped = SHIPPED.get(str(name))
    if shipped is None:
        return None
    path = FOLDER / shipped.file
    if not path.is_file():
        raise CheckpointError(f"{path}, the weights {name} of this package, is missing: install the package again.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != shipped.sha256:
        raise CheckpointError(f"{path} is not the file of {name} that was shipped: install the package again.")
    return path


def is_room(class_name: str) -> bool:
    """Whether a class of that name holds rooms of a floor plan."""
    words = class_name.lower().replace("_", " ").replace("-", " ").split()
    return any(word in ROOM_WORDS for word in (*words, " ".join(words)))


def names_for_rooms(class_names: Sequence[str]) -> list[str] | None:
    """The names with `room` for every kind of room, as shipped weights call it; None where no class is one."""
    found = [is_room(name) for name in class_names]
    return ["room" if room else name for room, name in zip(found, class_names, strict=True)] if any(found) else None


def write_for_shipping(checkpoint: Mapping[str, Any], path: Path) -> str:
    """Write what a detector needs of a run's checkpoint, with 16-bit numbers; returns the SHA-256 of the file.

    Args:
        checkpoint: of a run, as read.
        path: the new file.
    """
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in checkpoint["state_dict"].items()
        if not name.endswith("num_batches_tracked")
    }
    settings = {**checkpoint["hyper_parameters"], "weights": None, "backbone_weights": None, "backbone_norm": "frozen"}
    content = {
        "state_dict": state,
        "hyper_parameters": settings,
        "score_threshold": checkpoint["score_threshold"],
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": checkpoint["pytorch-lightning_version"],
    }
    import torch  # the rest of this module does without

    with atomic_write(path) as temporary:
        torch.save(content, temporary)
    return hashlib.sha256(path.read_bytes()).hexdigest()
