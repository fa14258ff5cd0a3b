"""Writing a detector as ONNX and for `torch.export`, and running what was written."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_lightning.errors import UsageError
from dino_lightning.export import OPSETS
from dino_lightning.export.onnx_model import onnxruntime_session
from dino_lightning.export.traceable import TraceableDetector, TraceablePreprocessing
from dino_lightning.training.module import DINOModule

OUTPUTS = ("boxes", "scores", "labels", "tokens")
INPUTS = {"inside": ("images",), "outside": ("images", "image_sizes", "original_sizes")}
NAMES = {
    "images": ("batch", "channels", "height", "width"),
    "tokens": ("batch", "queries"),
}  # of dynamic dimensions
PREPARED = ("prepared_images", "prepared_sizes", "sizes")  # what the preprocessing gives to the detector
MISSING = 'Exporting to ONNX needs more packages: pip install "dino-lightning[export]".'
DESCRIPTION_FILE = "dino_lightning.json"  # within a .pt2 file

Run = Callable[..., tuple[Tensor, ...]]


def describe_module(module: DINOModule, preprocessing: str) -> dict[str, Any]:
    """What a user of the exported file needs to know; stored in its metadata."""
    settings = module.hparams
    names = settings["class_names"] or [str(label) for label in range(settings["num_classes"])]
    return {
        "format": "dino_lightning detector 1",
        "preprocessing": preprocessing,
        "class_names": list(names),
        "category_ids": list(settings["category_ids"] or range(len(names))),
        "score_threshold": float(module.score_threshold),
        "image_size": settings["image_size"] or 800,
        "max_size": settings["max_size"] or 1333,
        "stretch_to": settings["stretch_to"],
        "mean": module.model.image_mean.flatten().tolist(),
        "std": module.model.image_std.flatten().tolist(),
        "dino_lightning": _version("dino-lightning"),
        "torch": torch.__version__,
    }


def write_torch(module: DINOModule, path: Path, description: Mapping[str, Any]) -> None:
    """Write a .pt2 file for `torch.export.load`, with the description as an extra file."""
    torch.export.save(_exported_detector(module), path, extra_files={DESCRIPTION_FILE: json.dumps(description)})


def run_torch(path: Path) -> Run:
    """The function in a .pt2 file."""
    return torch.export.load(path).module()


def write_onnx(module: DINOModule, path: Path, description: Mapping[str, Any], *, opset: int = OPSETS[0]) -> Run | None:
    """Write an ONNX file; the description becomes its metadata, all values but strings as JSON.

    Returns:
        The preprocessing in it, as a function of its own; None if it is outside.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnx.compose
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise UsageError(MISSING) from error
    model, prepare = _as_onnx(_exported_detector(module), INPUTS["outside"], OUTPUTS, opset), None
    if description["preprocessing"] == "inside":
        # Two graphs joined: sizes that are computed from sizes are too much for torch.export's symbols in one.
        before = _as_onnx(_exported_preprocessing(module, description), INPUTS["inside"], PREPARED, opset)
        prepare = run_onnx(before.SerializeToString(), PREPARED)
        model = onnx.compose.merge_models(
            onnx.compose.add_prefix(before, "preprocessing/", rename_inputs=False),
            onnx.compose.add_prefix(model, "detector/", rename_outputs=False),
            io_map=[
                (f"preprocessing/{name}", f"detector/{inner}")
                for name, inner in zip(PREPARED, INPUTS["outside"], strict=True)
            ],
        )
    _name_dimensions(model)
    model.producer_name, model.doc_string = "dino_lightning", "DINO object detector (arXiv 2203.03605)"
    onnx.helper.set_model_props(
        model,
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in description.items()},
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return prepare


def run_onnx(file: Path | bytes, outputs: Sequence[str] = OUTPUTS) -> Run:
    """The function in an ONNX file, or in its content, computed by onnxruntime on the CPU."""
    session = onnxruntime_session(file, ["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(value) for value in session.run(list(outputs), given))

    return run


def _exported_detector(module: DINOModule) -> torch.export.ExportedProgram:
    options = {name: module.hparams[name] for name in ("max_detections", "nms_iou_threshold")}
    detector = TraceableDetector(module.model, **options).eval()
    # Large enough for two cells and more on the coarsest level: PyTorch takes a size of 1 in an example for a constant.
    coarsest = 32 * 2 ** len(module.model.neck.projections)
    sizes = torch.tensor([[3 * coarsest, 4 * coarsest], [2 * coarsest, 3 * coarsest]])
    images = torch.zeros(2, 3, 3 * coarsest, 4 * coarsest)
    dynamic = torch.export.Dim.DYNAMIC
    # a clone: one tensor in two places would be traced as one argument
    example = (images, sizes, sizes.clone())
    return _exported(detector, example, ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic}, {0: dynamic}))


def _exported_preprocessing(module: DINOModule, description: Mapping[str, Any]) -> torch.export.ExportedProgram:
    sizes = {name: description[name] for name in ("image_size", "max_size", "stretch_to")}
    preparing = TraceablePreprocessing(module.model, **sizes).eval()
    images = torch.zeros(2, 3, 190, 274, dtype=torch.uint8)
    dynamic = torch.export.Dim.DYNAMIC
    return _exported(preparing, (images,), ({0: dynamic, 2: dynamic, 3: dynamic},))


def _exported(part: nn.Module, example: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> torch.export.ExportedProgram:
    with _plain_attention(), torch.no_grad(), _quiet():
        traced = torch.export.export(part, example, dynamic_shapes=shapes, strict=False)
        program: torch.export.ExportedProgram = traced.run_decompositions(_without_lists())
    return program


def _without_lists() -> dict[Any, Callable[..., list[Tensor]]]:
    """Rules that replace operations whose result is a list of tensors by slices.

    ONNX has sequences for lists, which TensorRT and the reader of OpenCV do not take.
    """
    aten = torch.ops.aten

    def split(tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
        ends = accumulate(sizes)
        return [aten.slice(tensor, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def split_evenly(tensor: Tensor, size: int, dim: int = 0) -> list[Tensor]:
        return [aten.slice(tensor, dim, start, start + size) for start in range(0, tensor.shape[dim], size)]

    def unbind(tensor: Tensor, dim: int = 0) -> list[Tensor]:
        return [aten.select(tensor, dim, index) for index in range(tensor.shape[dim])]

    return {aten.split_with_sizes.default: split, aten.split.Tensor: split_evenly, aten.unbind.int: unbind}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without PyTorch's own kernel for attention in evaluation, which ONNX does not have."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about its own internals, which the user cannot act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _as_onnx(
    program: torch.export.ExportedProgram, inputs: tuple[str, ...], outputs: tuple[str, ...], opset: int
) -> Any:
    """The traced program as an `onnx.ModelProto` with named inputs and outputs."""
    with torch.no_grad(), _quiet():
        exported = torch.onnx.export(
            program,
            (),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamo=True,
            external_data=False,
            optimize=False,  # torch 2.14's optimizer loses a node; onnxruntime has its own
            verbose=False,
        )
        assert exported is not None
        model = exported.model_proto
    del model.graph.value_info[:]  # sizes of what lies between, in symbols a thousand characters long
    return model


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
