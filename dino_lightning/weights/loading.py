"""Load weights of any origin into a detector, and report what was loaded, re-mapped, new and ignored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.model.backbone import pretrained_state
from dino_lightning.weights.download import interprocess_lock, is_address, local_file
from dino_lightning.weights.foreign_layouts import PROJECTS
from dino_lightning.weights.reading import CLASS_BIAS, LoadedWeights, coco_names, is_class_entry, read_weights
from dino_lightning.weights.sizes import differences
from dino_lightning.weights.zoo import named, weights_file

TRAINING_ONLY = "group_queries."
FEW_IMAGES = 5000  # below this, training from scratch is not worth it
OUTCOMES = ("loaded", "re-mapped", "new", "ignored")
_PARTS = {
    "backbone": "backbone",
    "neck": "neck",
    "encoder": "encoder",
    "level_embedding": "encoder",
    "query_selection": "query selection",
    "group_queries": "query selection",
    "decoder": "decoder",
}
_CLASS_PART = "class heads"
_TORCHVISION_NAME = re.compile(r"(?:(\w+_Weights)\.)?([A-Z][A-Z0-9_]*)")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from a file into a model.

    Attributes:
        source: the file or name, and the kind of weights.
        counts: number of tensors by (part of the model, outcome); outcomes are `OUTCOMES`.
        classes: a sentence on how the classes were matched; empty for a backbone alone.
        notes: further sentences for the user.
    """

    source: str
    counts: Mapping[tuple[str, str], int]
    classes: str = ""
    notes: tuple[str, ...] = ()

    def total(self, outcome: str) -> int:
        """Number of tensors with that outcome, over all parts."""
        return sum(count for (_, found), count in self.counts.items() if found == outcome)

    def line(self) -> str:
        """The source and the totals in one line."""
        sums = ", ".join(f"{self.total(outcome)} {outcome}" for outcome in OUTCOMES if self.total(outcome))
        return f"{self.source}: {sums} tensors."

    def __str__(self) -> str:
        present = {part for part, _ in self.counts}
        parts = [part for part in (*dict.fromkeys(_PARTS.values()), _CLASS_PART) if part in present]
        rows = [[part, *(self.counts.get((part, outcome), 0) for outcome in OUTCOMES)] for part in parts]
        rows.append(["all tensors", *(self.total(outcome) for outcome in OUTCOMES)])
        lines = ["".join(f"{cell:>11}" if index else f"  {cell:<17}" for index, cell in enumerate(row)) for row in rows]
        header = "  " + " " * 17 + "".join(f"{outcome:>11}" for outcome in OUTCOMES)
        said = [self.classes] if self.classes else []
        return "\n".join([f"{self.source}:", header, *lines, *said, *self.notes])


def load_initial_weights(model: DINO, place: str, class_names: Sequence[str] | None = None) -> LoadReport:
    """Load the initial weights of a detector from a file, an address or torchvision.

    Args:
        model: changed in place.
        place: a name of the table (`zoo`), which is fetched if need be; a file or address (see `local_file`) with any
            of the contents that `read_weights` knows; the name of weights that come with this package (`SHIPPED`), or
            of torchvision weights of the model's backbone, such as `IMAGENET1K_V2`.
        class_names: names of the model's labels, if known.

    Raises:
        CheckpointError: the weights cannot be found or read, or do not fit the model.
    """
    if _is_torchvision_name(place):
        return start_backbone_from(model, place)
    return load_weights(model, weights_file(place), class_names)


def start_backbone_from(model: DINO, place: str) -> LoadReport:
    """Load the initial weights of a detector's backbone; as `load_initial_weights`, for a backbone alone.

    Raises:
        CheckpointError: the weights cannot be found or read, do not fit, or are of a whole detector.
    """
    if not _is_torchvision_name(place):
        file = local_file(place)
        found = read_weights(file)
        if found.part == "detector":
            raise CheckpointError(
                f"{file} holds a whole detector; give it to --model.weights, not to backbone_weights."
            )
        return _load_backbone(model, found, file)
    name = model.backbone.name
    try:
        with interprocess_lock("torchvision"):  # one process downloads, the others use torchvision's cache
            state = pretrained_state(name, _weights_of(name, place))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    found = LoadedWeights("backbone", {f"body.{key}": value for key, value in state.items()}, "torchvision backbone")
    return _load_backbone(model, found, f"{place} for {name}")


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


def needs_download(place: str) -> bool:
    """Whether `place` is an address or a name of torchvision weights, rather than a path."""
    return is_address(place) or _is_torchvision_name(place)


def _is_torchvision_name(place: str) -> bool:
    return not is_address(place) and not Path(place).exists() and _TORCHVISION_NAME.fullmatch(place) is not None


def _weights_of(backbone: str, place: str) -> str:
    """The name of torchvision weights without that of their network, which must be the backbone's."""
    network, _, name = place.rpartition(".")
    if network and backbone in torchvision.models.list_models():
        expected = torchvision.models.get_model_weights(backbone).__name__
        if network != expected:
            raise ValueError(
                f"{place} are weights of another network; those of the backbone {backbone} are {expected}."
            )
    return name


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
        _load_backbone(model, found, path)
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
    notes = [*found.notes, *resized, *_check_semantics(model, found, path)]
    rows, how = _class_rows(found, class_names, model.num_classes)
    counts: Counter[tuple[str, str]] = Counter()
    for key in own:
        if is_class_entry(key):
            own[key], outcome = _class_entry(state[key], own[key], rows, model.num_classes)
            counts[_CLASS_PART, outcome] += 1
        elif key.startswith(TRAINING_ONLY) and (key not in state or state[key].shape != own[key].shape):
            counts[_part(key), "new"] += 1
        elif key in state:
            own[key] = state[key]
            counts[_part(key), "loaded"] += 1
    counts.update((_part(key), "ignored") for key in found.ignored)
    model.load_state_dict(own)
    classes = _describe(rows, class_names, len(state[CLASS_BIAS]), how)
    return LoadReport(f"{path}, a {found.source}", dict(counts), classes, tuple(notes))


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


def _load_backbone(model: DINO, found: LoadedWeights, source: str | Path) -> LoadReport:
    """Load a backbone's weights; norms of its maps that are not in the file keep their values."""
    own = model.backbone.state_dict()
    optional = {key for key in own if key.startswith("norms.") or key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in found.state and key not in optional]
    reshaped = [key for key in own if key in found.state and found.state[key].shape != own[key].shape]
    if missing or reshaped:
        raise CheckpointError(
            f"{source}, a {found.source}, does not fit the backbone {model.backbone.name}: {len(missing)} of "
            f"{len(own)} entries are missing and {len(reshaped)} have another shape (first: {(missing + reshaped)[0]})."
        )
    counts: Counter[tuple[str, str]] = Counter()
    for key in own:
        counts["backbone", "loaded" if key in found.state else "new"] += 1
        own[key] = found.state.get(key, own[key])
    counts["backbone", "ignored"] += len(found.ignored) + sum(key not in own for key in found.state)
    for key in model.state_dict():
        if not key.startswith("backbone."):
            counts[_CLASS_PART if is_class_entry(key) else _part(key), "new"] += 1
    model.backbone.load_state_dict(own)
    notes = ("Only the backbone is loaded; the rest of the detector is new.",)
    return LoadReport(f"{source}, a {found.source}", dict(counts), notes=(*found.notes, *notes))


def _part(key: str) -> str:
    return _PARTS.get(key.partition(".")[0], "backbone")
