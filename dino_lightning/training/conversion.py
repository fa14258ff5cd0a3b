"""A detector's weights from one layout to another, as files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dino_lightning.errors import CheckpointError
from dino_lightning.files import atomic_write
from dino_lightning.model.dino import PUBLISHED_SEMANTICS
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.foreign_layouts import PROJECTS, Layout, from_official
from dino_lightning.weights.published_layout import backbone_kind, to_published
from dino_lightning.weights.reading import CLASS_BIAS, LoadedWeights, coco_names, is_class_entry, read_weights
from dino_lightning.weights.sizes import heads_times_points, sizes
from dino_lightning.weights.zoo import named, weights_file

FileLayout = Literal["ours", "published", "detrex", "mmdet"]


def convert(place: str, output: Path, layout: FileLayout | None, contiguous: bool) -> str:
    """Convert a file, and replace the output if it exists; returns what was written, in words.

    Raises:
        CheckpointError: no such weights, or not those of a detector.
        OSError: the output cannot be written.
    """
    file = weights_file(place)
    found = read_weights(file)
    if found.part != "detector":
        raise CheckpointError(f"{file} is a {found.source}; only whole detectors are converted.")
    layout = layout or ("published" if found.source == "dino_lightning checkpoint" else "ours")
    state, names, ids = _classes(file, found, contiguous)
    classes = len(state[CLASS_BIAS])
    content: dict[str, Any] = {}
    try:
        if layout == "ours" or (found.source == "dino_lightning checkpoint" and found.settings):
            content = _our_checkpoint(file, state, _settings(file, found, state, names, ids))  # checks that all fits
        if layout == "ours":
            if found.score_threshold is not None:
                content["score_threshold"] = found.score_threshold
            backbone = content["hyper_parameters"].get("backbone", "resnet50")
            said = (
                f"a checkpoint of dino_lightning, {len(content['state_dict'])} entries, {backbone}, {classes} classes"
            )
        elif layout == "published":
            content = {"model": to_published(state)}
            said = f"{len(content['model'])} entries in the layout of published checkpoints, "
            said += f"num_classes={classes}, dn_labelbook_size={classes}"  # what the published program calls them
        else:
            foreign = _foreign(file, layout, state)
            content = {"model" if layout == "detrex" else "state_dict": foreign, "meta": {}}
            said = f"{len(foreign)} entries as {PROJECTS[layout]} writes them, {classes} classes"
    except KeyError as error:
        raise CheckpointError(f"{file} cannot be written in the published layout: {error.args[0]}") from error
    with atomic_write(output) as temporary:
        torch.save(content, temporary)
    return "\n".join([f"{output}: {said}.", *found.notes, *_semantics_to_set(file, found, layout)])


def _foreign(file: Path, layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return from_official(layout, to_published(state))
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be written as {PROJECTS[layout]} writes it: {error}") from error


def _semantics_to_set(file: Path, found: LoadedWeights, layout: str) -> list[str]:
    """What another program has to set for the same numbers: no layout but ours has room for it."""
    row = named(file)
    settings = found.settings or {} if row is None else row.options
    if layout == "ours" or (found.layout is not None and row is None):
        return []  # set already, or not known
    values = {name: settings.get(name, value) for name, value in PUBLISHED_SEMANTICS.items()}
    if layout == "published" and values == PUBLISHED_SEMANTICS:
        return []
    return [
        "It gives the same numbers only with " + ", ".join(f"{name} {value:g}" for name, value in values.items()) + "."
    ]


def _classes(
    file: Path, found: LoadedWeights, contiguous: bool
) -> tuple[dict[str, Tensor], list[str] | None, list[int] | None]:
    """The state dict, and the names and original ids of its classes, without COCO's gaps if that is wanted."""
    state = dict(found.state)
    for key in (CLASS_BIAS, "label_embedding.weight"):
        if key not in state:
            raise CheckpointError(f"{file} lacks {key}.")
    count = len(state[CLASS_BIAS])
    names = list(found.class_names) if found.class_names is not None else None
    ids: list[int] | None = list((found.settings or {}).get("category_ids") or range(count))
    kept = list(range(count))
    if contiguous:
        if count != len(coco_names()):
            raise CheckpointError(
                f"{file} has {count} classes, not COCO's {len(coco_names())} rows: drop --contiguous."
            )
        names = list(coco_names())
        kept = [row for row, name in enumerate(names) if name != "N/A"]
        names, ids = [names[row] for row in kept], kept
    for key in filter(is_class_entry, list(state)):
        rows = [*kept, len(state[key]) - 1] if key == "label_embedding.weight" else kept
        if len(state[key]) < len(rows):
            raise CheckpointError(f"{file}: {key} has {len(state[key])} rows, too few for {len(kept)} classes.")
        if rows != list(range(len(state[key]))):
            state[key] = state[key][rows]
    return state, names, ids if names is not None or found.settings is not None else None


def _settings(
    file: Path, found: LoadedWeights, state: Mapping[str, Tensor], names: list[str] | None, ids: list[int] | None
) -> dict[str, Any]:
    """The arguments of a `DINOModule` that these weights fit into."""
    known = dict(found.settings or {})
    if found.source == "dino_lightning checkpoint" and known:
        return known | {"num_classes": len(state[CLASS_BIAS]), "class_names": names, "category_ids": ids}
    semantics, told = _semantics(file, found), sizes(state)
    heads = known.get("nheads", 8)  # as published; the shapes do not tell
    both = heads_times_points(state)
    if "backbone" not in told or both is None or not isinstance(heads, int) or heads < 1 or both % heads:
        raise CheckpointError(f"{file}: its backbone or its sizes are none that this program can build.")
    trained = 3 if backbone_kind(state) == "other" else 5  # as published
    sized = told | semantics | {"num_heads": heads, "num_points": both // heads, "trainable_backbone_layers": trained}
    return {"class_names": names, "category_ids": ids, "backbone_weights": None, **sized}


def _semantics(file: Path, found: LoadedWeights) -> dict[str, Any]:
    """What a foreign file's weights need beside their sizes, which only the name of the file tells.

    Raises:
        CheckpointError: the name is none of the table.
    """
    row = named(file)
    if row is None and found.layout is not None:
        raise CheckpointError(
            f"{file} does not say how {PROJECTS[found.layout]} embedded the positions, and its name is none that "
            "`python -m dino_lightning weights` knows: give it the name that it was published under."
        )
    options = {} if row is None else row.options
    return {name: options[name] for name in PUBLISHED_SEMANTICS if name in options}


def _our_checkpoint(file: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Lightning and `load_detector` take for a checkpoint of a run."""
    try:
        with torch.device("meta"):  # sizes only
            module = DINOModule(**settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the sizes it names make no model ({error})") from error
    expected = module.model.state_dict()
    wrong = [key for key in expected.keys() | state.keys() if _shape(expected, key) != _shape(state, key)]
    if wrong:
        raise CheckpointError(f"{file} fits no model of its sizes: {min(wrong)} is missing, unknown or misshapen.")
    return {
        "state_dict": {f"model.{key}": state[key] for key in expected},
        "hyper_parameters": dict(module.hparams),
        "score_threshold": module.score_threshold,
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": re.sub(r"[^\d.].*", "", metadata.version("lightning")),
    }


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None
