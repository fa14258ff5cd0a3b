"""What a checkpoint of ours must hold, checked before anything of it is used: one sentence about what is wrong."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO

FORMAT = 1  # of our checkpoints; raised when an older version of this program would misread a newer one
FORMAT_KEY, VERSION_KEY = "dino_lightning_format", "dino_lightning_version"
OPTIONS_KEY = "dino_lightning_options"  # of the command line: the text of the run's config.yaml
DEFAULT_THRESHOLD = 0.3  # where no validation has found a better one
AT_LEAST_ONE = ("num_classes", "max_detections", "image_size", "max_size", "stretch_to", "num_heads", "num_points")
FROM_DATA = ("class_names", "category_ids", "image_size", "max_size")  # hyperparameters that training sets
# hyperparameters of a `DINOModule` that are read without one
OF_THE_MODULE: dict[str, Any] = {
    "class_names": list[str] | None,
    "category_ids": list[int] | None,
    "box_noise_scale": float | None,
}
COUNTS = ("epoch", "global_step")
WEIGHTS = ("state_dict", "raw_state_dict", "averaged_state_dict")  # entries that hold them, the first in every file
LEARNED = ("weight", "bias", "embedding")  # how names of floating-point tensors end; counters and indices are integers


def package_version() -> str:
    """The installed version of this package; `unknown` for a copy that is not installed, as in a job."""
    try:
        return metadata.version("dino-lightning")
    except metadata.PackageNotFoundError:
        return "unknown"


def check_checkpoint(content: Any, path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of ours, whose entries are of the right kinds.

    Args:
        content: as `read_checkpoint` gives it.
        path: for the message.

    Raises:
        CheckpointError: not a checkpoint of ours, one of a newer version, weights that are not finite, or entries of
            another kind.
    """
    if not isinstance(content, dict) or not {"hyper_parameters", "state_dict"} <= content.keys():
        raise CheckpointError(
            f"{path} is not a checkpoint of dino_lightning; give a published one to --model.weights of a training run."
        )
    check_format(content, path)
    for name in WEIGHTS:
        if name in content:
            _check_weights(content[name], name, path)
    settings = content["hyper_parameters"]
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise CheckpointError(f"{path} is damaged: its hyper_parameters are no options by name.")
    check_threshold(content.get("score_threshold", DEFAULT_THRESHOLD), path)
    for name in COUNTS:
        if not _fits(content.get(name, 0), int) or content.get(name, 0) < 0:
            raise CheckpointError(f"{path} is damaged: its {name} is {_short(content[name])}, not a whole number.")
    return content


def check_format(content: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint of a newer version; one without a format is of an older version.

    Raises:
        CheckpointError: its format is newer, or no number.
    """
    stored = content.get(FORMAT_KEY, FORMAT)
    if isinstance(stored, bool) or not isinstance(stored, int) or stored < 1:
        raise CheckpointError(f"{path} is damaged: its {FORMAT_KEY} is {_short(stored)}, which is no format.")
    if stored > FORMAT:
        raise CheckpointError(
            f"{path} is of a newer version of dino_lightning ({_short(content.get(VERSION_KEY))}, format {stored}); "
            f"this one, {package_version()}, reads formats up to {FORMAT}: install a newer version."
        )


def check_threshold(value: Any, path: str | Path) -> float:
    """A stored score threshold.

    Raises:
        CheckpointError: it is no number from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointError(f"{path} is damaged: its score_threshold is {_short(value)}, not a number from 0 to 1.")
    return float(value)


def check_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse weights of which some are not finite.

    Raises:
        CheckpointError: names the first such tensor.
    """
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} of its {len(state)} tensors hold values that are not finite (first: "
            f"{broken[0]}); the training had diverged, or the file is damaged."
        )


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor of a common kind: dense, not quantized, with its numbers."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _check_weights(state: Any, name: str, path: str | Path) -> None:
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} is damaged: its {name} holds no tensors by name.")
    for key, value in state.items():
        if not isinstance(key, str) or not is_plain(value):
            raise CheckpointError(f"{path} is damaged: {_short(key)} in its {name} is no plain tensor.")
        if not value.is_floating_point() and key.endswith(LEARNED):
            raise CheckpointError(f"{path} is damaged: {key} in its {name} holds {value.dtype} instead of weights.")
    check_finite(state, path)


def check_state(stored: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare a state dict with that of the model it is for.

    Raises:
        CheckpointError: tensors are missing, unknown, or of another shape or kind.
    """
    missing = [key for key in own if key not in stored]
    unknown = [key for key in stored if key not in own]
    other = [key for key, value in own.items() if key in stored and not _alike(stored[key], value)]
    if missing or unknown or other:
        first = [*missing, *unknown, *other][0]
        raise CheckpointError(
            f"{path} does not fit the model that its hyperparameters make: {len(missing)} of {len(own)} tensors are "
            f"missing, {len(unknown)} are unknown and {len(other)} are of another shape or kind (first: {first})."
        )


def _alike(stored: Tensor, own: Tensor) -> bool:
    kinds = [(value.is_floating_point(), value.is_complex(), value.dtype == torch.bool) for value in (stored, own)]
    return stored.shape == own.shape and kinds[0] == kinds[1]


# ------------------------------------------------------------------ hyperparameters


def check_settings(settings: Mapping[str, Any], path: str | Path, *classes: type) -> list[str]:
    """Check the types of stored hyperparameters by the annotations of those constructors that have them.

    Args:
        settings: hyperparameters by name.
        path: for the message.
        *classes: whose constructors take them, `DINO` besides.

    Returns:
        The names that none of the constructors has.

    Raises:
        CheckpointError: a value of another type.
    """
    known = _argument_types(DINO) | OF_THE_MODULE
    for owner in classes:
        known |= _argument_types(owner)
    for name, value in settings.items():
        too_small = name in AT_LEAST_ONE and isinstance(value, int) and value < 1
        if name in known and (too_small or not _fits(value, known[name])):
            raise CheckpointError(f"{path} is damaged: its hyperparameter {name} is {_short(value)}.")
    count = settings.get("num_classes")
    for name in ("class_names", "category_ids"):
        given = settings.get(name)
        if given is not None and count is not None and len(given) != count:
            raise CheckpointError(f"{path} is damaged: it has {len(given)} {name} for {count} classes.")
    ids = settings.get("category_ids") or []
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"{path} is damaged: its category_ids repeat.")
    return [name for name in settings if name not in known]


def check_hyperparameters(content: Mapping[str, Any], path: str | Path, *classes: type) -> None:
    """Check the types of a checkpoint's hyperparameters, and that this version has all of them.

    Args:
        content: of a checkpoint of ours.
        path: for the message.
        *classes: as in `check_settings`.

    Raises:
        CheckpointError: a value of another type, or one that none of the constructors takes.
    """
    unknown = check_settings(content["hyper_parameters"], path, *classes)
    if unknown:
        raise CheckpointError(f"{path} {_in_words(unknown, content)}.")


def _in_words(unknown: Sequence[str], content: Mapping[str, Any]) -> str:
    """What is said about hyperparameters that this version does not have, and about what may have them."""
    written, own = content.get(VERSION_KEY), package_version()
    if not isinstance(written, str) or written == "unknown":
        advice = "it is of another version, or of a subclass of yours: load it with what it was written by"
    elif written == own:
        advice = "this version wrote it, so they are of a subclass of yours or of changed code: load it with that"
    else:
        advice = f"it was written by version {_short(written)}: install that one"
    names = f"{', '.join(map(_short, unknown[:5]))}{', ...' if len(unknown) > 5 else ''}"
    return f"has hyperparameters that dino_lightning {own} does not know ({names}); {advice}"


def missing_settings(content: Mapping[str, Any], *classes: type) -> list[str]:
    """The hyperparameters that a checkpoint should have and lacks; older versions stored only those that were given."""
    if FORMAT_KEY not in content:
        return []
    settings = content["hyper_parameters"]
    names = dict.fromkeys(name for owner in (DINO, *classes) for name in _argument_types(owner))
    return [name for name in names if name not in settings or (name in FROM_DATA and settings[name] is None)]


def complete_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters with the defaults of those sizes of the detector that were not given: a default may change."""
    named = inspect.signature(DINO).parameters.values()
    return {each.name: each.default for each in named if each.default is not each.empty} | dict(given)


def _argument_types(owner: type) -> dict[str, Any]:
    """The annotations of the named arguments of a constructor, and of those that it hands others on to."""
    found: dict[str, Any] = {}
    for each in reversed(owner.__mro__):
        if "__init__" not in vars(each) or each is object:
            continue
        constructor = vars(each)["__init__"]
        try:
            hints = typing.get_type_hints(constructor)
        except (NameError, TypeError):  # names that are imported for type checkers alone
            hints = {}
        for argument in list(inspect.signature(constructor).parameters.values())[1:]:
            if argument.kind in (argument.KEYWORD_ONLY, argument.POSITIONAL_OR_KEYWORD):
                found[argument.name] = hints.get(argument.name, Any)
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type; lists and tuples count as equal, whole numbers as numbers."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is not None and issubclass(origin, Mapping):
        keys, values = arguments
        return isinstance(value, Mapping) and all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_fits(each, arguments[0]) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, Tensor) else f"a tensor {tuple(value.shape)}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."
