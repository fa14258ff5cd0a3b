"""Writing a detector as ONNX, for OpenVINO and for `torch.export`, and running what was written."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dino_lightning.errors import UsageError
from dino_lightning.export import DEFAULT_OPSET, RESIZING_OPSET
from dino_lightning.export.exported_model import DESCRIPTION_FILE, FORMAT, OUTPUTS, Run, stored_text
from dino_lightning.export.folding import fold_shapes, lower_opset, name_types
from dino_lightning.export.onnx_model import run_onnx
from dino_lightning.export.openvino_model import require_openvino, run_openvino, write_openvino
from dino_lightning.export.torch_model import run_torch
from dino_lightning.export.tracing import (
    Size,
    quiet,
    sampled_by_pytorch,
    traced_canvas,
    traced_detector,
    traced_preprocessing,
)
from dino_lightning.training.module import DINOModule

INPUTS = {"inside": ("images",), "outside": ("images", "image_sizes", "original_sizes")}
NAMES = {
    "images": ("batch", "channels", "height", "width"),
    "tokens": ("batch", "queries"),
}  # of dynamic dimensions
PREPARED = ("prepared_images", "prepared_sizes", "sizes")  # what the preprocessing gives to the detector
MISSING = 'Exporting to ONNX needs more packages: pip install "dino-lightning[export]".'


def describe_module(module: DINOModule, preprocessing: str, static: Size | None = None) -> dict[str, Any]:
    """What a user of the exported file needs to know; stored in its metadata."""
    settings = module.hparams
    names = settings["class_names"] or [str(label) for label in range(settings["num_classes"])]
    return {
        "format": FORMAT,
        "preprocessing": preprocessing,
        "class_names": list(names),
        "category_ids": list(settings["category_ids"] or range(len(names))),
        "score_threshold": float(module.score_threshold),
        "image_size": settings["image_size"] or 800,
        "max_size": settings["max_size"] or 1333,
        "stretch_to": settings["stretch_to"],
        "static": None if static is None else list(static),
        "tta_views": settings["tta_views"],
        "max_detections": settings["max_detections"],
        "nms_iou_threshold": settings["nms_iou_threshold"],
        "mean": module.model.image_mean.flatten().tolist(),
        "std": module.model.image_std.flatten().tolist(),
        "dino_lightning": _version("dino-lightning"),
        "torch": torch.__version__,
    }


def write_and_run(
    module: DINOModule, path: Path, kind: str, description: Mapping[str, Any], opset: int = DEFAULT_OPSET
) -> tuple[Run, Run | None]:
    """Write a file of a kind; its function, and its preprocessing as a function of its own, see `write_onnx`.

    Args:
        module: what to write.
        path: the file; for OpenVINO the weights are written beside it, with the suffix .bin.
        kind: "onnx", "openvino" or "torch".
        description: as in `write_onnx`.
        opset: as there.

    Raises:
        UsageError: a package is missing.
    """
    if kind == "torch":
        write_torch(module, path, description)
        return run_torch(path), None
    if kind == "onnx":
        prepare = write_onnx(module, path, description, opset=opset)
        return run_onnx(path), prepare
    require_openvino()
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "model.onnx"
        prepare = write_onnx(module, onnx_file, description, opset=opset)
        write_openvino(onnx_file, path, stored_text(description))
    return run_openvino(path), prepare


def write_torch(module: DINOModule, path: Path, description: Mapping[str, Any]) -> None:
    """Write a .pt2 file for `torch.export.load`, with the description as an extra file."""
    program = sampled_by_pytorch(traced_detector(module))
    torch.export.save(program, path, extra_files={DESCRIPTION_FILE: json.dumps(description)})


def write_onnx(
    module: DINOModule, path: Path, description: Mapping[str, Any], *, opset: int = DEFAULT_OPSET
) -> Run | None:
    """Write an ONNX file; the description becomes its metadata, all values but strings as JSON.

    Args:
        module: what to write.
        path: the file.
        description: of `describe_module`; its `preprocessing` and `static` decide what is written.
        opset: the ONNX operator set, of `OPSETS`; those before 18 for what does not resize by itself.

    Returns:
        The preprocessing in it, as a function of its own; None if it does not resize by itself.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnx.compose
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise UsageError(MISSING) from error
    static, inside = description["static"], description["preprocessing"] == "inside"
    static = None if static is None else (static[0], static[1])
    prepare = None
    if inside and static is not None:
        model = _as_onnx(traced_canvas(module, static), INPUTS["inside"], OUTPUTS, opset)
    else:
        model = _as_onnx(traced_detector(module, static), INPUTS["outside"], OUTPUTS, opset)
    if inside and static is None:
        # Two graphs joined: sizes that are computed from sizes are too much for torch.export's symbols in one.
        sizes = {name: description[name] for name in ("image_size", "max_size", "stretch_to")}
        before = _as_onnx(traced_preprocessing(module, sizes), INPUTS["inside"], PREPARED, opset)
        prepare = run_onnx(before.SerializeToString(), PREPARED)
        model = onnx.compose.merge_models(
            onnx.compose.add_prefix(before, "preprocessing/", rename_inputs=False),
            onnx.compose.add_prefix(model, "detector/", rename_outputs=False),
            io_map=[
                (f"preprocessing/{name}", f"detector/{inner}")
                for name, inner in zip(PREPARED, INPUTS["outside"], strict=True)
            ],
        )
        del model.opset_import[1:]  # of both graphs, the same
    _name_dimensions(model)
    model.producer_name, model.doc_string = "dino_lightning", "DINO object detector (arXiv 2203.03605)"
    onnx.helper.set_model_props(model, stored_text(description))
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        if opset >= RESIZING_OPSET:
            raise
        reason = " ".join(str(error).split())
        raise UsageError(f"This network cannot be written with --opset {opset} ({reason}); choose 18 to 20.") from error
    onnx.save(model, path)
    return prepare


def _as_onnx(
    program: torch.export.ExportedProgram, inputs: tuple[str, ...], outputs: tuple[str, ...], opset: int
) -> Any:
    """The traced program as an `onnx.ModelProto` with named inputs and outputs."""
    with torch.no_grad(), quiet():
        exported = torch.onnx.export(
            program,
            (),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=max(opset, RESIZING_OPSET),  # it writes no older one
            custom_translation_table={torch.ops.dino_lightning.grid_sample.default: _grid_sample},
            dynamo=True,
            external_data=False,
            optimize=False,  # torch 2.14's optimizer loses a node; onnxruntime has its own
            verbose=False,
        )
        assert exported is not None
        model = exported.model_proto
    del model.graph.value_info[:]  # sizes of results on the way, in symbols a thousand characters long
    name_types(model)
    fold_shapes(model)
    if opset < RESIZING_OPSET:
        lower_opset(model, opset)
    return model


def _grid_sample(image: Any, grid: Any) -> Any:
    """`formulation.grid_sample` in ONNX; images and results are of onnxscript."""
    from onnxscript import opset18

    return opset18.GridSample(image, grid, align_corners=0, mode="bilinear", padding_mode="zeros")


def _name_dimensions(model: Any) -> None:
    """Give the dynamic dimensions of inputs and outputs readable names, as in `NAMES`."""
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        names = NAMES.get(value.name, ("batch", "detections"))
        for dim, name in zip(dims, names, strict=False):
            if not dim.HasField("dim_value"):
                dim.dim_param = name


def _version(package: str) -> str:
    try:
        return re.sub(r"\+.*", "", version(package))
    except PackageNotFoundError:  # in a job the package is not installed
        return "unknown"
