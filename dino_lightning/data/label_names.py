"""The names of the classes of map-style datasets, whose labels are plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch.utils.data import Subset

from dino_lightning.errors import DataError

SHOWN = 12  # classes, in one sentence
BACKGROUND = ("background", "__background__")
ClassNames = Sequence[str] | Mapping[int, str]


def label_names(given: ClassNames | None, occurring: Mapping[str, list[int]], train: Any) -> dict[int, str]:
    """The name of every class, by the value of its label.

    Args:
        given: what the user says, or None for the names of a COCO file behind the dataset, else "class 1" and so on.
        occurring: the values that occur in each dataset, by its name; "train" is among them.
        train: the training dataset.

    Raises:
        DataError: a label of the training dataset has no name.
    """
    values = occurring["train"]
    everywhere = {value for found in occurring.values() for value in found}
    if given is None:
        while isinstance(train, Subset):
            train = train.dataset
        listed = getattr(getattr(train, "coco", None), "cats", None) or {}
        if listed and everywhere <= set(listed):
            return {int(value): str(listed[value]["name"]) for value in sorted(listed)}
        return {value: f"class {value}" for value in values}
    if isinstance(given, Mapping):
        names = {int(value): str(given[value]) for value in sorted(given)}
    else:
        names = _listed([str(name) for name in given], everywhere)
    if names.get(0, "").lower() in BACKGROUND and 0 not in everywhere:
        del names[0]
    unknown = [value for value in values if value not in names]
    if unknown or not names:
        _refuse_names(unknown, names)
    return names


def _listed(names: list[str], occurring: set[int]) -> dict[int, str]:
    """Names of a list by value: from 0 where a label or a name of the background says so, else from 1."""
    from_zero = 0 in occurring or (bool(names) and names[0].lower() in BACKGROUND)
    return dict(enumerate(names, 0 if from_zero else 1))


def _refuse_names(unknown: list[int], names: Mapping[int, str]) -> NoReturn:
    known = f"{min(names)} to {max(names)}" if names else "none"
    raise DataError(
        f"class_names: the labels {', '.join(map(str, unknown[:SHOWN]))} of the train dataset have no name; those "
        f"named are {known}. Give all names, as a dict by label where labels have gaps."
    )


def names_in_words(names: Mapping[int, str]) -> str:
    """Which label is which class, in a sentence."""
    shown = ", ".join(f"{value} is {name}" for value, name in list(names.items())[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"Labels of the datasets: {shown}{more}. Inside they are 0 to {len(names) - 1}; class_names changes it."
