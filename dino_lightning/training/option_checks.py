"""Ranges of the numbers that `DINOModule` takes, and of those that it hands on to the detector; needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# Weights of losses and costs are checked where they are summed: see `losses.matcher.check_weights`.
MOST_LEVELS = 8  # of features; the last has a 1,024th of the side of the image
AT_LEAST_0 = (
    "lr", "backbone_lr", "weight_decay", "clip_grad_norm", "max_non_finite_steps", "warmup_steps", "box_noise_scale",
    "num_encoder_layers", "num_denoising",
)  # fmt: skip
AT_LEAST_1 = (
    "max_detections", "hidden_dim", "num_heads", "num_points", "ffn_dim", "num_decoder_layers", "num_queries",
    "num_feature_levels", "denoising_multiple", "query_groups",
)  # fmt: skip
ABOVE_0 = ("rooms_lr_factor", "backbone_layer_decay", "position_temperature")
TTA_VIEWS = (1, 2, 4, 8)  # ways to see an image: as it is; mirrored; upside down as well; and all four transposed
SHARES = ("label_noise_ratio", "dropout")


def check_names(given: Iterable[str], valid: Collection[str]) -> None:
    """Refuse sizes of the detector that it does not have.

    Args:
        given: names of arguments.
        valid: the names that there are.

    Raises:
        TypeError: names those that there are not.
    """
    unknown = [name for name in given if name not in valid]
    if unknown:
        raise TypeError(
            f"DINOModule has no argument {', '.join(unknown)}; those of the detector are {', '.join(valid)}."
        )


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse numbers out of range; options that are absent or None are left to their defaults.

    Args:
        options: arguments of `DINOModule` and `DINO`, by name.

    Raises:
        ValueError: names the first one.
    """
    ranges = {
        **dict.fromkeys(AT_LEAST_0, (0.0, math.inf, "must be at least 0")),
        **dict.fromkeys(AT_LEAST_1, (1.0, math.inf, "must be at least 1")),
        **dict.fromkeys(ABOVE_0, (math.ulp(0.0), math.inf, "must be more than 0")),
        **dict.fromkeys(SHARES, (0.0, 1.0, "must lie between 0 and 1")),
        "num_feature_levels": (1, MOST_LEVELS, f"must be from 1 to {MOST_LEVELS}"),
        "lr_drop_factor": (math.ulp(0.0), 1.0, "must be more than 0 and at most 1"),
        "box_epsilon": (math.ulp(0.0), 0.5, "must be more than 0 and at most 0.5"),
        "position_offset": (-math.inf, math.inf, "must be a number"),
    }
    for name, (low, high, words) in ranges.items():
        value = options.get(name)
        if isinstance(value, int | float) and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it {words}{'' if math.isfinite(value) else ' and finite'}.")
    check_tta_views(options.get("tta_views", 1))
    for epoch in options.get("lr_drop_epochs") or ():
        if epoch < 1:
            raise ValueError(f"lr_drop_epochs names epoch {epoch}; the first that the rate can drop after is 1.")


def check_tta_views(count: int) -> None:
    """Refuse a number of views for test-time augmentation that there is not.

    Raises:
        ValueError: it is none of `TTA_VIEWS`.
    """
    if isinstance(count, bool) or count not in TTA_VIEWS:
        raise ValueError(
            f"tta_views is {count}; it must be 1 (images as they are), 2 (mirrored as well), 4 (all flips) or 8 (flips "
            "and quarter turns)."
        )


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their whole names, such as `trainer.max_epochs`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
