"""The options that weights of a name bring with them, as arguments of `fit`; needs no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dino_lightning.weights.zoo import needed_options


def with_options_of_weights(args: Sequence[str]) -> list[str]:
    """The options that weights of a name need, put before those of the user, which win over them."""
    return [*model_options(needed_options(place_of_weights(args))), *args]


def place_of_weights(args: Sequence[str]) -> str | None:
    """What the arguments and their configuration files say for `model.weights`."""
    place: str | None = None
    for previous, arg in zip(["", *args], args, strict=False):
        name, equals, value = arg.partition("=")
        if not equals:
            name, value = previous, arg
        if name == "--model.weights":
            place = None if value == "null" else value
        elif name in ("--config", "-c"):
            place = _weights_in(Path(value), place)
    return place


def _weights_in(config: Path, before: str | None) -> str | None:
    """`model.weights` of a configuration file; what it was before where the file does not say. The parser judges it."""
    try:
        model = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("model") or {}
        found = model.get("weights", before)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return before
    return found if isinstance(found, str) else None


def model_options(values: Mapping[str, Any]) -> list[str]:
    """Options of the model by name, as arguments."""
    return [
        f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    ]
