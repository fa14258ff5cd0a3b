"""Load the weights of a backbone alone into a detector: from a file, torchvision or timm."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torchvision

from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.model.backbone import pretrained_state
from dino_lightning.model.timm_backbone import TimmBackbone, timm_state
from dino_lightning.weights.download import interprocess_lock, local_file
from dino_lightning.weights.load_report import CLASS_PART, LoadReport, part_of
from dino_lightning.weights.places import PRETRAINED, is_library_name
from dino_lightning.weights.reading import LoadedWeights, is_class_entry, read_weights


def start_backbone_from(model: DINO, place: str) -> LoadReport:
    """Load the initial weights of a detector's backbone; as `loading.load_initial_weights`, for a backbone alone.

    Raises:
        CheckpointError: the weights cannot be found or read, do not fit, or are of a whole detector.
    """
    backbone = model.backbone
    if isinstance(backbone, TimmBackbone) and is_library_name(place) and place != PRETRAINED:
        raise CheckpointError(
            f"{place} are weights of torchvision, and {backbone.name} is a network of timm: set backbone_weights to "
            f"{PRETRAINED}, to null or to a file. Which weights timm takes is part of the name: timm/NETWORK.TAG."
        )
    if not is_library_name(place):
        file = local_file(place)
        found = read_timm_weights(backbone, file) if isinstance(backbone, TimmBackbone) else read_weights(file)
        if found.part == "detector":
            raise CheckpointError(
                f"{file} holds a whole detector; give it to --model.weights, not to backbone_weights."
            )
        return load_backbone(model, found, file)
    name = backbone.name
    library = "timm" if isinstance(backbone, TimmBackbone) else "torchvision"
    try:
        with interprocess_lock(library):  # one process downloads, the others use the library's cache
            if isinstance(backbone, TimmBackbone):
                state = timm_state(name, backbone.strides)
            else:
                weights = pretrained_state(name, _weights_of(name, place))
                state = {f"body.{key}": value for key, value in weights.items()}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return load_backbone(model, LoadedWeights("backbone", state, f"{library} backbone"), f"{place} for {name}")


def read_timm_weights(backbone: TimmBackbone, file: Path) -> LoadedWeights:
    """Weights for a network of timm from a file: one of ours, or one that timm reads for that network.

    Raises:
        CheckpointError: neither of them.
    """
    try:
        found = read_weights(file)
        if found.part == "detector" or set(backbone.state_dict()) <= set(found.state):
            return found
    except CheckpointError:  # a layout that timm may know
        pass
    try:
        return LoadedWeights("backbone", timm_state(backbone.name, backbone.strides, file), "timm backbone")
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def load_backbone(model: DINO, found: LoadedWeights, source: str | Path) -> LoadReport:
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
            counts[CLASS_PART if is_class_entry(key) else part_of(key), "new"] += 1
    model.backbone.load_state_dict(own)
    notes = ("Only the backbone is loaded; the rest of the detector is new.",)
    return LoadReport(f"{source}, a {found.source}", dict(counts), notes=(*found.notes, *notes))


def _weights_of(backbone: str, place: str) -> str:
    """The name of torchvision weights without that of their network, which must be the backbone's."""
    if place == PRETRAINED:
        return "DEFAULT"
    network, _, name = place.rpartition(".")
    if network and backbone in torchvision.models.list_models():
        expected = torchvision.models.get_model_weights(backbone).__name__
        if network != expected:
            raise ValueError(
                f"{place} are weights of another network; those of the backbone {backbone} are {expected}."
            )
    return name
