"""Load weights of any origin into a detector, and report what was loaded, re-mapped, new and ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.weights.backbone_loading import load_backbone, start_backbone_from
from dino_lightning.weights.foreign_layouts import PROJECTS
from dino_lightning.weights.load_report import CLASS_PART, LoadReport, part_of
from dino_lightning.weights.places import is_library_name
from dino_lightning.weights.reading import CLASS_BIAS, LoadedWeights, coco_names, is_class_entry, read_weights
from dino_lightning.weights.sizes import differences
from dino_lightning.weights.zoo import named, weights_file

TRAINING_ONLY = "group_queries."
FEW_IMAGES = 5000  # below this, training from scratch is not worth it


def load_initial_weights(model: DINO, place: str, class_names: Sequence[str] | None = None) -> LoadReport:
    """Load the initial weights of a detector from a file, an address or torchvision.

    Args:
        model: changed in place.
        place: a name of the table (`zoo`), which is fetched if need be; a file or address (see `local_file`) with any
            of the contents that `read_weights` knows; the name of weights that come with this package (`SHIPPED`), or
            of torchvision weights of the model's backbone, such as `IMAGENET1K_V2`; or `pretrained`, for the best
            weights of the backbone that torchvision or timm has.
        class_names: names of the model's labels, if known.

    Raises:
        CheckpointError: the weights cannot be found or read, or do not fit the model.
    """
    if is_library_name(place):
        return start_backbone_from(model, place)
    return load_weights(model, weights_file(place), class_names)


def advice_on_a_pretrained_backbone(num_images: int) -> list[str]:
    """Advice when only the backbone is pretrained; empty if `num_images` is 0 (unknown) or large."""
    if not 0 < num_images < FEW_IMAGES:
        return []
    return [
        f"Only the backbone is pretrained, and {num_images} images are few: with weights of a whole detector "
        "(--model.weights, e.g. a published checkpoint) training needs far fewer epochs, and AP is higher."
    ]


def advice_on_random_weights(model: DINO, num_images: int) -> list[str]:
    """Advice when nothing is pretrained; `num_images` is 0 if unknown."""
    advice = []
    if 0 < num_images < FEW_IMAGES:
        advice.append(
            f"Training from scratch on {num_images} images: this kind of detector needs {FEW_IMAGES:,} real images or "
            "more to learn from random weights. Start from pretrained weights with --model.weights (a "
            "published checkpoint), or at least a pretrained backbone with --model.backbone_weights."
        )
    if model.backbone.norm == "frozen":
        advice.append(
            "The backbone starts from random weights, but its norms and first stages are frozen as for pretrained "
            "weights. To train from scratch, set backbone_norm to group and trainable_backbone_layers to 5."
        )
    return advice


def load_weights(model: DINO, path: str | Path, class_names: Sequence[str] | None = None) -> LoadReport:
    """Load the weights in a file into a detector, or into its backbone if the file holds a backbone alone.

    Rows of the class heads are taken from classes of the same name. Without names, an equal number of rows is taken in
    order, and COCO's 91 rows are reduced to its 80 classes. The rows of all other classes keep their initial values.

    Args:
        model: changed in place.
        path: a file, see `read_weights`.
        class_names: names of the model's labels, if known.

    Raises:
        CheckpointError: the file is not a checkpoint, or is of another architecture.
    """
    found = read_weights(path)
    return (
        load_backbone(model, found, path)
        if found.part == "backbone"
        else _load_detector(model, found, path, class_names)
    )


def _load_detector(
    model: DINO, found: LoadedWeights, path: str | Path, class_names: Sequence[str] | None
) -> LoadReport:
    own, state = model.state_dict(), dict(found.state)
    resized = _resize_queries(state, own)
    # counts of batches, which a backbone with frozen norms does not have
    # and queries for training alone, which either side may have
    optional = {key for key in own if key.endswith("num_batches_tracked") or key.startswith(TRAINING_ONLY)}
    missing = [key for key in sorted(own, key=is_class_entry) if key not in state and key not in optional]
    unknown = [key for key in state if key not in own and not key.startswith(TRAINING_ONLY)]
    reshaped = [
        key
        for key in own
        if key in state and not key.startswith(TRAINING_ONLY) and not _fits(key, state[key], own[key])
    ]
    if missing or unknown or reshaped:
        raise CheckpointError(
            f"{path} is of another architecture: {len(missing)} of the model's {len(own)} entries are missing, "
            f"{len(unknown)} are unknown and {len(reshaped)} have another shape (first: "
            f"{[*missing, *unknown, *reshaped][0]}). " + differences(state, own)
        )
    _check_heads(state, path)
    notes = [*found.notes, *resized, *_check_semantics(model, found, path)]
    rows, how = _class_rows(found, class_names, model.num_classes)
    counts: Counter[tuple[str, str]] = Counter()
    for key in own:
        if is_class_entry(key):
            own[key], outcome = _class_entry(state[key], own[key], rows, model.num_classes)
            counts[CLASS_PART, outcome] += 1
        elif key.startswith(TRAINING_ONLY) and (key not in state or state[key].shape != own[key].shape):
            counts[part_of(key), "new"] += 1
        elif key in state:
            own[key] = state[key]
            counts[part_of(key), "loaded"] += 1
    counts.update((part_of(key), "ignored") for key in found.ignored)
    model.load_state_dict(own)
    classes = _describe(rows, class_names, len(state[CLASS_BIAS]), how)
    return LoadReport(f"{path}, a {found.source}", dict(counts), classes, tuple(notes), found.score_threshold)


def _check_heads(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse class heads that differ in their number of classes.

    Raises:
        CheckpointError: they do.
    """
    count = len(state[CLASS_BIAS])
    for key, value in state.items():
        if is_class_entry(key) and key != "label_embedding.weight" and len(value) != count:
            raise CheckpointError(f"{path} is damaged: {key} has {len(value)} classes, {CLASS_BIAS} has {count}.")


def _resize_queries(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Make the file's content queries as many as the model's: the first, or all repeated with noise; says so.

    Proposals take the queries in the order of their scores, so the first ones are those that find objects. The noise,
    a tenth of their deviation, tells the copies apart.
    """
    key = "query_selection.content_queries.weight"
    if key not in state or state[key].ndim != 2 or state[key].shape[1:] != own[key].shape[1:]:
        return []
    theirs, count = state[key], len(own[key])
    if len(theirs) == count or not len(theirs):
        return []
    if count < len(theirs):
        state[key] = theirs[:count]
        return [f"Of its {len(theirs)} queries the first {count} are taken."]
    repeated = theirs.repeat(-(-count // len(theirs)), 1)[:count]
    noise = torch.randn(repeated.shape, generator=torch.Generator().manual_seed(0)) * theirs.float().std() / 10
    noise[: len(theirs)] = 0
    state[key] = repeated + noise.to(repeated.dtype)
    return [f"Its {len(theirs)} queries are repeated, with noise, to make {count}."]


def _check_semantics(model: DINO, found: LoadedWeights, path: str | Path) -> list[str]:
    """Refuse weights that the model's position embedding or clamp do not suit; notes where nobody says what suits.

    Raises:
        CheckpointError: the weights are known to need other ones.
    """
    own = model.semantics()
    row = named(path)
    needed = (found.settings or {}) if row is None else row.options
    wrong = {name: needed[name] for name in own if name in needed and needed[name] != own[name]}
    if wrong:
        options = " ".join(f"--model.{name}={value}" for name, value in wrong.items())
        raise CheckpointError(f"{path}: these weights give right numbers only with {options}.")
    if row is None and found.layout is not None:
        values = ", ".join(f"{name} {value:g}" for name, value in own.items())
        return [
            f"The file does not say how {PROJECTS[found.layout]} embedded the positions; assumed is {values}. "
            "Weights that are taken by name know it."
        ]
    return []


def _fits(key: str, theirs: Tensor, own: Tensor) -> bool:
    """Whether the shapes agree, apart from the number of classes."""
    first = 1 if is_class_entry(key) and theirs.ndim == own.ndim else 0
    return theirs.shape[first:] == own.shape[first:] and theirs.is_floating_point() == own.is_floating_point()


def _class_entry(theirs: Tensor, own: Tensor, rows: Sequence[int | None], num_classes: int) -> tuple[Tensor, str]:
    """The new value of a class head or of the label embedding, and its outcome."""
    if theirs.shape == own.shape and list(rows) == list(range(num_classes)):
        return theirs, "loaded"
    taken = [(row, source) for row, source in enumerate(rows) if source is not None and source < len(theirs)]
    if not taken:
        return own, "new"
    fresh = own.clone()
    targets, sources = zip(*taken, strict=True)
    fresh[list(targets)] = theirs[list(sources)].to(fresh.dtype)
    if len(fresh) > num_classes:  # the label embedding's spare row
        fresh[-1] = theirs[-1].to(fresh.dtype)
    return fresh, "re-mapped"


def _class_rows(found: LoadedWeights, names: Sequence[str] | None, count: int) -> tuple[list[int | None], str]:
    """For each of our labels, its row in the file or None for a new class; and how they were matched, in words."""
    source_count = len(found.state[CLASS_BIAS])
    if found.class_names is not None and names is not None:
        row_of: dict[str, int] = {}
        for row, name in enumerate(found.class_names):
            if name != "N/A":
                row_of.setdefault(_normalized(name), row)
        return [row_of.get(_normalized(name)) for name in names], "matched by name"
    if source_count == count:
        nameless = "" if found.class_names is not None else ", which has no names for them"
        return list(range(count)), f"kept in the order of the file{nameless}"
    used = [row for row, name in enumerate(coco_names()) if name != "N/A"]
    if source_count == len(coco_names()) and count == len(used):
        return list(used), "matched by COCO's order"
    return [None] * count, ""


def _normalized(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _describe(rows: Sequence[int | None], names: Sequence[str] | None, source_count: int, how: str) -> str:
    kept = sum(row is not None for row in rows)
    if not kept:
        return f"class heads are new ({source_count} classes in the file, {len(rows)} here)."
    fresh = f", {len(rows) - kept} new" if kept < len(rows) else ""
    listed = ""
    if names is not None and how == "matched by name":
        listed = f" ({_some([name for name, row in zip(names, rows, strict=True) if row is not None])}"
        new = [name for name, row in zip(names, rows, strict=True) if row is None]
        listed += f"; new: {_some(new)})" if new else ")"
    return f"class heads: {kept} of {len(rows)} classes {how}{fresh}{listed}."


def _some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
