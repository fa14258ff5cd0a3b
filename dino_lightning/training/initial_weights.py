"""Which weights a run starts from, by the module's options, and what is said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dino_lightning.console import without_secrets
from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.weights.backbone_loading import start_backbone_from
from dino_lightning.weights.loading import (
    advice_on_a_pretrained_backbone,
    advice_on_random_weights,
    load_initial_weights,
)
from dino_lightning.weights.places import PLACES, starting_option
from dino_lightning.weights.shipped import names_for_rooms


def take_addresses(module: LightningModule) -> dict[str, str | None]:
    """The places of initial weights as they were given; the module's hyperparameters, which are stored, lose secrets.

    Args:
        module: a `DINOModule` that has saved its hyperparameters.
    """
    given = {name: module.hparams[name] for name in PLACES}
    initial: Any = module._hparams_initial  # what loggers write
    for options in (module.hparams, initial):
        options.update(without_secrets(given))
    return given


def detector_weights(
    options: Mapping[str, Any], class_names: Sequence[str] | None
) -> tuple[str, Sequence[str] | None] | None:
    """The weights of a whole detector that a run starts from, and the names of its classes in them.

    Args:
        options: of a `DINOModule`.
        class_names: of the dataset, if known.

    Returns:
        What `load_initial_weights` takes; None where there are none.
    """
    option = starting_option(options, class_names)
    if option == "weights":
        return options["weights"], _mapped(class_names, options["class_map"] or {})
    if option == "weights_for_rooms":
        return options["weights_for_rooms"], names_for_rooms(class_names or ())
    return None


def rate_factor(options: Mapping[str, Any]) -> float:
    """What the learning rates are multiplied by: `rooms_lr_factor` where a run starts from `weights_for_rooms`."""
    from_rooms = starting_option(options, options["class_names"]) == "weights_for_rooms"
    return float(options["rooms_lr_factor"]) if from_rooms else 1.0


def _mapped(class_names: Sequence[str] | None, class_map: Mapping[str, str]) -> Sequence[str] | None:
    """The names under which the weights have the classes.

    Raises:
        ValueError: the dataset has no class of a name in the map.
    """
    unknown = [name for name in class_map if class_names is not None and name not in class_names]
    if unknown:
        raise ValueError(
            f"class_map names {', '.join(unknown)}, which is no class of the dataset; its classes are "
            f"{', '.join(class_names or ())}."
        )
    return None if class_names is None else [class_map.get(name, name) for name in class_names]


def start(model: DINO, options: Mapping[str, Any], num_images: int) -> None:
    """Load the weights that a run starts from, and say what was loaded or what would be better.

    Args:
        model: changed in place.
        options: of a `DINOModule`.
        num_images: in the training split; 0 if unknown.

    Raises:
        CheckpointError: the weights cannot be found or read, or do not fit the model.
    """
    option, whole = starting_option(options, options["class_names"]), detector_weights(options, options["class_names"])
    if whole is not None:
        way_out = "--model.weights_for_rooms null" if option == "weights_for_rooms" else ""
        try:
            rank_zero_info(load_initial_weights(model, *whole))
        except CheckpointError as error:
            raise CheckpointError(f"{error} Or start without them: {way_out}." if way_out else str(error)) from error
        if way_out:
            slower = rate_factor(options)
            rates = f"Learning rates are {slower:g} times what the options say. " if slower != 1 else ""
            rank_zero_info(f"{rates}{way_out} starts without them.")
    elif option == "backbone_weights":
        rank_zero_info(start_backbone_from(model, options[option]).line())
        for advice in advice_on_a_pretrained_backbone(num_images):
            rank_zero_info(advice)
    else:
        for advice in advice_on_random_weights(model, num_images):
            rank_zero_warn(advice)
