"""Read weights from files of any origin, identified by their content, without running code from them."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from dino_lightning.errors import CheckpointError
from dino_lightning.files import unreadable
from dino_lightning.weights.download import is_address, local_file
from dino_lightning.weights.foreign_layouts import PROJECTS, Layout, layout_of, to_official
from dino_lightning.weights.published_layout import (
    backbone_from_published,
    backbone_kind,
    from_published,
    wrong_indices,
)
from dino_lightning.weights.shipped import shipped_file
from dino_lightning.weights.stored import check_checkpoint, check_finite, check_settings, is_plain

_MODULE_PREFIX = "model."  # where a DINOModule keeps its DINO
_WRAPPERS = ("state_dict", "model")  # keys under which training programs store the weights

# Where a folder keeps its model, best first: of a SageMaker job, of a run, of a run's checkpoints.
MODEL_FILES = (
    "model.ckpt", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "best.ckpt", "last.ckpt",
)  # fmt: skip

EXPORTED = {".onnx": "ONNX", ".xml": "OpenVINO", ".pt2": "torch.export"}  # what `export` writes, by the file's end

# Of other projects, by the end of the file's name and by the beginning of a key.
_OTHER_FILES = {".pdparams": "PaddlePaddle", ".safetensors": "safetensors"}
_OTHER_LAYOUTS = {
    "model.backbone.conv_encoder.": "transformers",
    "model.backbone.model._backbone.": "transformers",
    "model.model.transformer.": "NVIDIA TAO",
    "model.model.backbone.": "NVIDIA TAO",
    "model.transformer.": "NVIDIA TAO or another trainer around a DINO",
}
CLASS_BIAS = "query_selection.class_head.bias"  # one value for each class, in every detector
_CLASS_ENTRY = re.compile(r"(decoder\.class_head\.(\d+\.)?|query_selection\.class_head\.)(weight|bias)")


@dataclass(frozen=True)
class LoadedWeights:
    """Weights from a file, under our names.

    Attributes:
        part: whether the file holds a whole detector or a backbone alone.
        state: state dict of our `DINO`, or of our `Backbone`.
        source: the kind of file, in words.
        class_names: names of the labels, if the file has them.
        ignored: entries of the file that are not used.
        notes: sentences for the user about peculiarities of the file.
        settings: stored settings of the model, if the file has them.
        score_threshold: the threshold of the best F1, if the file has it.
        layout: of another project than the published one; None else.
    """

    part: Literal["detector", "backbone"]
    state: dict[str, Tensor]
    source: str
    class_names: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    score_threshold: float | None = None
    layout: Layout | None = None


def read_checkpoint(path: str | Path) -> Any:
    """The content of a checkpoint file, read without running any code from it.

    Raises:
        CheckpointError: the file does not exist, cannot be read, is not a checkpoint, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"Checkpoint {path} does not exist.")
    try:
        _check_sums(path)
        # Published files carry their command line as a Namespace, which is harmless and allowed by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read safely: it is not a PyTorch file, is damaged, or holds "
            "objects other than tensors and plain values."
        ) from error
    except PermissionError as error:
        raise CheckpointError(f"{path} {unreadable(error)}.") from error
    except Exception as error:  # damaged archives raise anything
        reason = str(error).partition("\n")[0]
        said = f" ({reason.rstrip('.')})" if " " in reason else ""  # not a bare number
        raise CheckpointError(f"{path} is not a PyTorch checkpoint, or it is damaged{said}.") from error


def find_model(path: str | Path) -> Path:
    """The model file that a path means: itself, or that of a folder; or of weights in this package, or of an address.

    Raises:
        CheckpointError: a folder without a model, or with several exported files of one kind and nothing else.
    """
    shipped = shipped_file(path)
    if shipped is not None:
        return shipped
    if is_address(str(path)):
        return local_file(str(path))
    path = Path(path)
    if not path.is_dir():
        return path
    for name in MODEL_FILES:
        if (path / name).is_file():
            return path / name
    for suffix, kind in EXPORTED.items():
        exported = sorted(path.glob(f"*{suffix}"))
        if len(exported) == 1:
            return exported[0]
        if exported:
            names = ", ".join(file.name for file in exported)
            raise CheckpointError(f"{path} has several {kind} files ({names}); name one of them.")
    raise CheckpointError(
        f"{path} holds no model; looked for {', '.join(MODEL_FILES)} and a file that `export` wrote "
        f"({', '.join(EXPORTED)})."
    )


def _check_sums(path: Path) -> None:
    """Check the checksums in the file, which PyTorch writes but does not read; raise ValueError if one is wrong."""
    if zipfile.is_zipfile(path):  # the older format has none
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the checksum of {broken} in it is wrong")


def read_weights(path: str | Path) -> LoadedWeights:
    """The weights of a detector or a backbone from a file in any of the known layouts.

    Detectors: published DINO checkpoints, checkpoints of ours, or the bare state dict of either. Backbones: the state
    dict of a torchvision network, of our `Backbone`, or of a Swin Transformer or ConvNeXt as its authors publish it.

    Raises:
        CheckpointError: the file is not a checkpoint, or is of another model.
    """
    if (kind := _OTHER_FILES.get(Path(path).suffix.lower())) is not None and Path(path).is_file():
        raise CheckpointError(f"{path} is a file of {kind}, which is not read; see `python -m dino_lightning weights`.")
    content = read_checkpoint(path)
    state = _state_dict(content)
    if state is None:
        raise CheckpointError(f"{path} holds no state dict of a DINO model or a backbone (names to tensors).")
    check_finite(state, path)
    for beginning, kind in _OTHER_LAYOUTS.items():
        if any(key.startswith(beginning) for key in state):
            raise CheckpointError(
                f"{path} holds a model of {kind}, whose layout is not read; see `python -m dino_lightning weights`."
            )
    settings = content.get("hyper_parameters")
    if not isinstance(settings, Mapping):
        settings = _namespace(content.get("args"))
    ours = {key.removeprefix(_MODULE_PREFIX): value for key, value in state.items() if _is_models(key)}
    try:
        layout = layout_of(state)
        if layout is not None:
            return _foreign_detector(layout, state)
        if "decoder.norm.weight" in ours or "decoder.norm.weight" in state:
            found = _our_detector(ours if "decoder.norm.weight" in ours else state, settings)
            return _with_stored(found, content, path)
        if any(key.startswith("transformer.") for key in state):
            return _published_detector(state, content, settings)
        return _backbone(state, settings)
    except CheckpointError:
        raise
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise CheckpointError(f"{path} is not a DINO checkpoint: {reason}") from error


def is_class_entry(key: str) -> bool:
    """Whether an entry has one row for each class (and one more in the label embedding)."""
    return key == "label_embedding.weight" or _CLASS_ENTRY.fullmatch(key) is not None


def coco_names() -> tuple[str, ...]:
    """The names of COCO's category ids 0 to 90, as published models number their classes; gaps are "N/A"."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ("N/A", *names[1:])


def _is_models(key: str) -> bool:
    return key.startswith(_MODULE_PREFIX)


def _namespace(args: object) -> dict[str, Any] | None:
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else None


def _state_dict(content: Any) -> dict[str, Tensor] | None:
    """The state dict in the content of a file, without the prefix that data parallel training adds."""
    if not isinstance(content, dict):
        return None
    found = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), content)
    if not found or not all(isinstance(key, str) and is_plain(value) for key, value in found.items()):
        return None
    return {key.removeprefix("module."): value for key, value in found.items()}


def _our_detector(state: dict[str, Tensor], settings: Mapping[str, Any] | None) -> LoadedWeights:
    given = (settings or {}).get("class_names")
    names = tuple(given) if isinstance(given, list | tuple) and all(isinstance(name, str) for name in given) else ()
    count = len(state.get(CLASS_BIAS, ()))
    if names and len(names) != count:
        raise ValueError(f"it names {len(names)} classes, but its class heads have {count}.")
    return LoadedWeights(
        part="detector",
        state=state,
        source="dino_lightning checkpoint",
        class_names=names or None,
        settings=settings,
    )


def _with_stored(found: LoadedWeights, content: Mapping[str, Any], path: str | Path) -> LoadedWeights:
    """Weights with the threshold that their checkpoint stores, which has been checked.

    Raises:
        CheckpointError: a checkpoint of a newer version, or damaged.
    """
    if "hyper_parameters" not in content:
        return found
    check_checkpoint(content, path)
    check_settings(content["hyper_parameters"], path)
    threshold = content.get("score_threshold")
    return replace(found, score_threshold=None if threshold is None else float(threshold))


def _published_detector(
    state: dict[str, Tensor], content: Mapping[str, Any], settings: Mapping[str, Any] | None
) -> LoadedWeights:
    ours, ignored = from_published(state)
    notes = []
    wrong = wrong_indices(ours)
    if wrong:
        ours |= wrong
        notes.append(
            f"{len(wrong)} tables of relative positions in the file are corrupt, as after averaging of weights; "
            "they are recomputed."
        )
    if isinstance(content.get("ema_model"), dict):
        notes.append("The file has averaged weights (ema_model) as well; they are ignored.")
    names = None
    if "decoder.class_head.0.bias" in ours:
        notes.append("Its decoder layers have heads of their own.")
    if len(ours.get(CLASS_BIAS, ())) == len(coco_names()):
        names = coco_names()
        notes.append("Its 91 classes have no names and are assumed to be COCO's categories.")
    return LoadedWeights(
        part="detector",
        state=ours,
        source="published DINO checkpoint",
        class_names=names,
        ignored=ignored,
        notes=tuple(notes),
        settings=settings,
    )


def _foreign_detector(layout: Layout, state: dict[str, Tensor]) -> LoadedWeights:
    ours, ignored = from_published(to_official(layout, state))
    names = tuple(name for name in coco_names() if name != "N/A")
    notes = []
    if len(ours[CLASS_BIAS]) == len(names):
        notes.append("Its 80 classes have no names and are assumed to be COCO's.")
    counters = tuple(key for key in state if key.endswith("num_batches_tracked"))
    return LoadedWeights(
        part="detector",
        state=ours | wrong_indices(ours),
        source=f"DINO checkpoint of {PROJECTS[layout]}",
        class_names=names if len(ours[CLASS_BIAS]) == len(names) else None,
        ignored=(*ignored, *counters),
        notes=tuple(notes),
        layout=layout,
    )


def _backbone(state: dict[str, Tensor], settings: Mapping[str, Any] | None) -> LoadedWeights:
    """A backbone alone, in our layout, torchvision's or that of the authors of Swin and ConvNeXt."""
    if any(key.startswith("body.") for key in state):
        return LoadedWeights("backbone", state, "backbone of dino_lightning", settings=settings)
    if any(key.startswith(("layer1.", "features.")) for key in state):
        known = {f"body.{key}": value for key, value in state.items()}
        return LoadedWeights("backbone", known, "torchvision backbone")
    kind = backbone_kind(state)
    if kind == "other":
        raise ValueError(
            f"it has entries such as {next(iter(state))!r}, but none of a detector or backbone in a known layout."
        )
    ours, ignored = backbone_from_published(state)
    name = "Swin Transformer" if kind == "swin" else "ConvNeXt"
    return LoadedWeights("backbone", ours | wrong_indices(ours), f"published {name} backbone", ignored=ignored)
