"""Which option names the weights that a run starts from, and what kind of place it names. Nothing is read here.

Needs no PyTorch: `launch` plans a job without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dino_lightning.weights.download import is_address
from dino_lightning.weights.shipped import names_for_rooms

PLACES = ("weights", "weights_for_rooms", "backbone_weights")  # the options that may be addresses
PRETRAINED = "pretrained"
_TORCHVISION_NAME = re.compile(r"(?:(\w+_Weights)\.)?([A-Z][A-Z0-9_]*)")


def starting_option(options: Mapping[str, Any], class_names: Sequence[str] | None) -> str | None:
    """The option that names the weights a run starts from; None where it starts from random values.

    Args:
        options: of a `DINOModule`. `weights` wins over `weights_for_rooms`, which is for datasets that have a class of
            rooms, and both win over `backbone_weights`.
        class_names: of the dataset, if known.
    """
    usable = {
        "weights": True,
        "weights_for_rooms": names_for_rooms(class_names or ()) is not None,
        "backbone_weights": True,
    }
    return next((name for name in PLACES if options[name] is not None and usable[name]), None)


def needs_download(place: str) -> bool:
    """Whether `place` is an address or names weights of torchvision or timm, rather than a path."""
    return is_address(place) or is_library_name(place)


def is_library_name(place: str) -> bool:
    """Whether `place` names weights of torchvision or timm, rather than a file."""
    known = place == PRETRAINED or _TORCHVISION_NAME.fullmatch(place) is not None
    return known and not is_address(place) and not Path(place).exists()
