"""The one adapter between our state dict and the published DINO checkpoints (layout of IDEA-Research/DINO)."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from dino_lightning.model import DINO

# Ours -> published, first match wins. The heads that all decoder layers share stand once per layer in published files.
_PREFIXES = (
    ("level_embedding", "transformer.level_embed"),
    ("encoder.", "transformer.encoder."),
    ("decoder.query_position_head.", "transformer.decoder.ref_point_head."),
    ("decoder.bbox_head.", "transformer.decoder.bbox_embed.{layer}."),
    ("decoder.class_head.", "transformer.decoder.class_embed.{layer}."),
    ("decoder.", "transformer.decoder."),
    ("query_selection.content_queries.", "transformer.tgt_embed."),
    ("query_selection.output_projection.", "transformer.enc_output."),
    ("query_selection.output_norm.", "transformer.enc_output_norm."),
    ("query_selection.bbox_head.", "transformer.enc_out_bbox_embed."),
    ("query_selection.class_head.", "transformer.enc_out_class_embed."),
    ("label_embedding.", "label_enc."),
    ("neck.projections.", "input_proj."),
    ("backbone.", "backbone.0."),
)
_ATTENTION = (("self_attention.", "self_attn."), ("cross_attention.", "cross_attn."))
_SHARED_HEAD = re.compile(r"^(?:transformer\.decoder\.)?(bbox_embed|class_embed)\.\d+\.")
_MODULE_PREFIX = "model."  # where a DINOModule keeps its DINO

# Entries with one row for each class (and, in the label embedding, one more).
_CLASS_ENTRIES = (
    "decoder.class_head.weight",
    "decoder.class_head.bias",
    "query_selection.class_head.weight",
    "query_selection.class_head.bias",
    "label_embedding.weight",
)


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class LoadedWeights:
    """A detector's weights as found in a file, under our names.

    Attributes:
        state: our state dict.
        class_names: the names of the labels, where the file tells them.
        source: what kind of file it was, in words.
    """

    state: dict[str, Tensor]
    class_names: tuple[str, ...] | None
    source: str


def to_published_key(key: str) -> str:
    """Our name of an entry -> its name in a published file; `{layer}` stands for each decoder layer.

    Raises:
        KeyError: an entry the published layout has no place for.
    """
    renamed = _renamed(key, _PREFIXES, _ATTENTION)
    if renamed is None:
        raise KeyError(f"The published DINO layout has no place for {key!r}.")
    return renamed


def from_published_key(key: str) -> str:
    """The name of an entry in a published file, any alias -> our name.

    Raises:
        KeyError: an entry we have no place for.
    """
    key = _SHARED_HEAD.sub(r"transformer.decoder.\1.{layer}.", key.removeprefix("module."))
    back = [[(published, ours) for ours, published in table] for table in (_PREFIXES, _ATTENTION)]
    renamed = _renamed(key, *back)
    if renamed is None:
        raise KeyError(f"{key!r} is no entry of a published DINO checkpoint.")
    return renamed


def _renamed(key: str, prefixes: Sequence[tuple[str, str]], parts: Sequence[tuple[str, str]]) -> str | None:
    """The key with the first prefix that fits exchanged, and all parts; None if no prefix fits."""
    for old, new in prefixes:
        if key.startswith(old):
            renamed = new + key[len(old) :]
            for old_part, new_part in parts:
                renamed = renamed.replace(old_part, new_part)
            return renamed
    return None


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict -> the published one, with the shared heads under all their names."""
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("decoder.layers."))
    published: dict[str, Tensor] = {}
    for key, value in state.items():
        name = to_published_key(key)
        if "{layer}" in name:
            for layer in range(layers):
                alias = name.format(layer=layer)
                published[alias] = published[alias.removeprefix("transformer.decoder.")] = value
        else:
            published[name] = value
    return published


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict, with or without aliases -> ours.

    Raises:
        CheckpointError: an entry we have no place for.
    """
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue  # frozen batch norm has no use for it
        try:
            ours.setdefault(from_published_key(key), value)
        except KeyError as error:
            raise CheckpointError(str(error.args[0])) from error
    return ours


def read_checkpoint(path: str | Path) -> Any:
    """The content of a checkpoint file, read without running any code from it.

    Raises:
        CheckpointError: no such file, or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {path} does not exist.")
    try:
        # Published files carry their command line as a Namespace, which is harmless and allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read safely: it is no PyTorch file, or it holds objects "
            "other than tensors and plain values."
        ) from error
    except Exception as error:  # whatever a damaged archive provokes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a PyTorch checkpoint, or it is damaged ({reason}).") from error


def read_weights(path: str | Path) -> LoadedWeights:
    """A detector's weights from a published DINO checkpoint, one of ours, or a bare state dict of either.

    Raises:
        CheckpointError: not a checkpoint, or not of this model.
    """
    content = read_checkpoint(path)
    names: tuple[str, ...] | None = None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        state = {
            key.removeprefix(_MODULE_PREFIX): value
            for key, value in content["state_dict"].items()
            if key.startswith(_MODULE_PREFIX)
        }
        known = content.get("hyper_parameters", {}).get("class_names")
        names = tuple(known) if known else None
        source = "dino_lightning checkpoint"
    else:
        state = content.get("model", content) if isinstance(content, dict) else content
        source = "published DINO checkpoint"
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict of a DINO model (names to tensors).")
    if "decoder.norm.weight" in state:
        return LoadedWeights(state, names, source)
    try:
        state = from_published(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a DINO checkpoint: {error}") from error
    if len(state.get("decoder.class_head.bias", ())) == 91:
        names = coco_names()
    return LoadedWeights(state, names, source)


def coco_names() -> tuple[str, ...]:
    """The names of COCO's category ids 0 to 90, as published models number their classes; gaps are "N/A"."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ("N/A", *names[1:])


def load_weights(model: DINO, path: str | Path, class_names: Sequence[str] | None = None) -> str:
    """Start a detector from the weights in a file.

    Classes of the same name keep their rows of the class heads; without names on both sides they are kept where the
    class count is the same. The other classes start afresh.

    Args:
        model: changed in place.
        path: see `read_weights`.
        class_names: the names of the model's labels, where known.

    Returns:
        One line that says what was loaded.

    Raises:
        CheckpointError: the file is not a checkpoint, or of another architecture.
    """
    loaded = read_weights(path)
    own = model.state_dict()
    others = [key for key in own if key not in _CLASS_ENTRIES]
    missing = [key for key in others if key not in loaded.state]
    unknown = [key for key in loaded.state if key not in own]
    if missing or unknown:
        example = f"it lacks {missing[0]}" if missing else f"it has {unknown[0]}, which the model lacks"
        raise CheckpointError(
            f"{path} is of another architecture: {len(missing)} of the model's {len(own)} entries are missing and "
            f"{len(unknown)} are unknown ({example}). Check backbone, feature levels and the number of layers."
        )
    for key in others:
        if loaded.state[key].shape != own[key].shape:
            raise CheckpointError(
                f"{path} is of another architecture: {key} is {tuple(loaded.state[key].shape)} in the file and "
                f"{tuple(own[key].shape)} in the model. Check hidden_dim, num_queries and the other sizes."
            )
        own[key] = loaded.state[key]
    count = len(loaded.state.get("decoder.class_head.bias", ()))
    rows = _class_rows(loaded.class_names, count, class_names, model.num_classes)
    targets = [row for row, source in enumerate(rows) if source is not None]
    sources = [source for source in rows if source is not None]
    for key in _CLASS_ENTRIES:
        if key in loaded.state and targets:
            fresh = own[key].clone()
            fresh[targets] = loaded.state[key][sources]
            if len(fresh) > model.num_classes:  # the label embedding's spare row
                fresh[-1] = loaded.state[key][-1]
            own[key] = fresh
    model.load_state_dict(own)
    return f"{path}: {loaded.source}, {len(others)} of {len(others)} tensors loaded; " + _describe(
        rows, count, by_name=loaded.class_names is not None and class_names is not None
    )


def _class_rows(
    source_names: Sequence[str] | None, source_count: int, names: Sequence[str] | None, count: int
) -> list[int | None]:
    """For each of our labels, the row of the file to take, or None for a fresh start."""
    if source_names is not None and names is not None:
        row_of = {_normalized(name): row for row, name in enumerate(source_names) if name != "N/A"}
        return [row_of.get(_normalized(name)) for name in names]
    return list(range(count)) if source_count == count else [None] * count


def _normalized(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _describe(rows: Sequence[int | None], source_count: int, *, by_name: bool) -> str:
    kept = sum(row is not None for row in rows)
    if not kept:
        return f"class heads start afresh ({source_count} classes in the file, {len(rows)} here)."
    how = "matched by name" if by_name else "kept as they are"
    fresh = f", {len(rows) - kept} start afresh" if kept < len(rows) else ""
    return f"class heads: {kept} of {len(rows)} classes {how}{fresh}."
