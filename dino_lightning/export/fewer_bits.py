"""An exported file with its products in 16 or 8 bits, what that costs in accuracy, and what it saves in time."""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dino_lightning.console import bar_seconds, say
from dino_lightning.data.dataset import CocoDetection, Sample
from dino_lightning.errors import UsageError
from dino_lightning.export.exported_model import ExportedModel, stored_text
from dino_lightning.export.onnx_model import OnnxModel
from dino_lightning.export.openvino_int8 import write_openvino_int8
from dino_lightning.export.openvino_model import OpenVinoModel, copy_openvino, write_openvino
from dino_lightning.metrics import CocoMetric

PRECISIONS = ("fp16", "int8")
LARGEST_LOSS = 0.005  # of F1, half a point
CALIBRATION_IMAGES = 32  # at most, spread over the split
ROUNDS = 9
MISSING = (
    "--precision {} needs onnxruntime's tools for it, which this version lacks ({}): "
    'pip install --upgrade "dino-lightning[export]".'
)


@dataclass(frozen=True)
class Measured:
    """What a file finds in the validation images, and how long it takes.

    Attributes:
        AP: COCO's average precision over IoU 0.50:0.95, 0-1.
        AP50: the same at IoU 0.50.
        F1: the best over one common score threshold.
        ms: milliseconds for the first image without reading and resizing it, the median of `ROUNDS` rounds in turns.
        spread: largest less smallest of these rounds, as a share of the median.
    """

    AP: float
    AP50: float
    F1: float
    ms: float
    spread: float


def write_fewer_bits(
    onnx_file: Path, path: Path, kind: str, precision: str, description: Mapping[str, Any], images: CocoDetection
) -> dict[str, Measured]:
    """Write a file in a lower precision, with its accuracy and latency before and after in its metadata.

    Args:
        onnx_file: in float32, of `write_onnx`.
        path: the file to write; for OpenVINO the weights are written beside it, with the suffix .bin.
        kind: "onnx" or "openvino".
        precision: "fp16", convolutions and products with weights in half precision; or "int8", the same in 8 bits,
            weights by channel and activations by the range that they have in `CALIBRATION_IMAGES` images. All else,
            coordinates and boxes included, is computed in float32, and inputs and outputs stay as they are. For
            OpenVINO "fp16" is how weights are stored; the device decides what it computes in.
        description: of `describe_module`.
        images: the validation split, untransformed, with ground truth.

    Returns:
        What was measured of "float32" and of `precision`.

    Raises:
        UsageError: a package is missing, or the images have no boxes.
    """
    load: Callable[[Path], ExportedModel] = OpenVinoModel if kind == "openvino" else OnnxModel
    copy = copy_openvino if kind == "openvino" else _copy_with
    with tempfile.TemporaryDirectory() as folder:
        before, lower, after = (Path(folder) / f"{name}{path.suffix}" for name in ("before", "lower", "after"))
        stored_in_half = precision == "fp16" and kind == "openvino"  # the device decides what it computes in
        if not stored_in_half:
            bits = {"fp16": "16", "int8": "8"}[precision]
            say(f"Converting products with weights to {bits} bits ...", sys.stderr)
        if kind == "openvino":
            write_openvino(onnx_file, before, stored_text(description))
        else:
            before = onnx_file
        with _quiet_tools(precision):
            if stored_in_half:
                write_openvino(onnx_file, lower, {}, half=True)
            elif precision == "fp16":
                _write_half(onnx_file, lower)
            else:
                write = write_openvino_int8 if kind == "openvino" else write_int8
                write(before, lower, _calibration(load(before), images))
        copy(lower, after, stored_text(description))
        measured = measure({"float32": load(before), precision: load(after)}, images)
        accuracy = {"images": len(images), **{name: asdict(values) for name, values in measured.items()}}
        copy(lower, path, stored_text({**description, "precision": precision, "accuracy": accuracy}))
    return measured


def measure(models: Mapping[str, ExportedModel], images: CocoDetection, rounds: int = ROUNDS) -> dict[str, Measured]:
    """Evaluate files on the same images, and time them in turns on the first.

    Raises:
        UsageError: there is no image, or none has a box.
    """
    metrics = {name: CocoMetric(class_names=images.classes.names) for name in models}
    title = "Evaluating " + " and ".join(models)
    for sample in tqdm(_samples(images), title, len(images), unit="image", mininterval=bar_seconds()):
        assert sample.ground_truth is not None
        for name, model in models.items():
            found = model.detect([sample.image], threshold=0.0, tta_views=1)
            metrics[name].update(found, [sample.ground_truth], [sample.image_id])
    if not len(images) or all(metric.compute()["F1"] < 0 for metric in metrics.values()):
        raise UsageError(f"{images.annotations.path} has no boxes; measuring a lower precision needs images with some.")
    first = images[0].image
    inputs = {name: model.inputs(first) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):  # the first warms up
        for name, model in models.items():
            start = time.perf_counter()
            model.run(*inputs[name])
            if turn:
                seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, metric in metrics.items():
        values, median = metric.compute(), statistics.median(seconds[name])
        spread = (max(seconds[name]) - min(seconds[name])) / median
        results[name] = Measured(values["AP"], values["AP50"], values["F1"], 1000 * median, spread)
    return results


def table(measured: Mapping[str, Measured], images: int) -> str:
    """What was measured as text, for a number of images."""
    lines = [f"on {images} validation images", "precision      AP    AP50      F1       ms  spread"]
    lines += [
        f"{name:<9}  {row.AP:>6.4f}  {row.AP50:>6.4f}  {row.F1:>6.4f}  {row.ms:>7.1f}  {row.spread:>6.0%}"
        for name, row in measured.items()
    ]
    return "\n".join(lines)


def _samples(images: CocoDetection) -> Iterator[Sample]:
    return (images[index] for index in range(len(images)))


def _calibration(model: ExportedModel, images: CocoDetection) -> Iterator[tuple[Tensor, ...]]:
    """What a file is given for some images, spread over all of them."""
    count = min(CALIBRATION_IMAGES, len(images))
    for place in range(count):
        yield model.inputs(images[place * len(images) // count].image)


def write_int8(source: Path, path: Path, inputs: Iterable[tuple[Tensor, ...]]) -> None:
    """Write an ONNX file with convolutions and products with weights in 8 bits.

    Of what was tried (benchmarks/RESULTS.md) this is the smallest and fastest; weights alone in 8 bits save less.
    Weights take 7 of the 8 bits, so
    that the file detects alike on processors without VNNI, where 8 lost more than a point of F1. OpenVINO 2026.4 cannot
    compile what it makes of R50, "any_of(scale.size(), OC, 1U)".

    Args:
        source: in float32, of `write_onnx`.
        path: the file to write.
        inputs: what the file is given, for some images; of these, activations get their ranges.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    remaining = iter(inputs)
    names = [value.name for value in onnx.load(source, load_external_data=False).graph.input]

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def get_next(self) -> dict[str, Any] | None:
            given = next(remaining, None)
            return None if given is None else dict(zip(names, (value.numpy() for value in given), strict=True))

    with tempfile.TemporaryDirectory() as folder:
        simple = Path(folder) / "simple.onnx"
        quant_pre_process(str(source), str(simple), skip_symbolic_shape=True)
        graph = onnx.load(simple).graph
        stored = {value.name for value in graph.initializer}
        quantize_static(
            str(simple),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_quantize=[node.name for node in graph.node if _has_weights(node, stored)],
            per_channel=True,
            reduce_range=True,  # weights in 7 bits: processors without VNNI add two products in 16 bits, which saturate
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _write_half(source: Path, path: Path) -> None:
    """Write an ONNX file with convolutions and products with weights in half precision.

    Every other tensor stays in float32, but for sums, maxima and ReLU between convolutions: of those, no coordinate is
    made. (onnxruntime's and onnxconverter-common's tools pass each tensor through half precision, coordinates too.)
    """
    import numpy as np
    import onnx

    model = onnx.load(source)
    graph = model.graph
    stored = {value.name: value for value in graph.initializer}
    halves: dict[str, str] = {}  # tensors by name, and the name of the same in half precision
    features: set[str] = set()  # what convolutions give, and what is made of nothing else
    nodes = []

    def cast(name: str, result: str, kind: int) -> Any:
        return onnx.helper.make_node("Cast", [name], [result], name=f"{result}/Cast", to=kind)

    for node in graph.node:
        between = node.op_type in ("Add", "MaxPool", "Relu") and features.issuperset(node.input)
        if not between and not _has_weights(node, stored):
            nodes.append(node)
            continue
        if between or node.op_type == "Conv":
            features.update(node.output)
        for place, name in enumerate(node.input):
            if name and name not in halves:
                halves[name] = f"{name}/half"
                if name in stored:
                    values = onnx.numpy_helper.to_array(stored[name]).astype(np.float16)
                    graph.initializer.append(onnx.numpy_helper.from_array(values, halves[name]))
                else:
                    nodes.append(cast(name, halves[name], onnx.TensorProto.FLOAT16))
            node.input[place] = halves.get(name, name)
        output = node.output[0]
        node.output[0] = halves[output] = f"{output}/half"
        nodes += [node, cast(halves[output], output, onnx.TensorProto.FLOAT)]
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [value for value in graph.initializer if value.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(node for node in nodes if read.intersection(node.output))
    graph.initializer.extend(kept)
    onnx.save(model, path)


def _has_weights(node: Any, stored: Container[str]) -> bool:
    """Whether a node is a convolution or a product, with weights that are stored in the file."""
    return node.op_type in ("Conv", "Gemm", "MatMul") and len(node.input) > 1 and node.input[1] in stored


def _copy_with(source: Path, path: Path, stored: Mapping[str, str]) -> None:
    """Copy an ONNX file, with other metadata; it is checked."""
    import onnx

    model = onnx.load(source)
    model.producer_name, model.doc_string = "dino_lightning", "DINO object detector (arXiv 2203.03605)"
    onnx.helper.set_model_props(model, dict(stored))
    used = {node.domain for node in model.graph.node}
    imports = [entry for entry in model.opset_import if entry.domain in used]  # onnxruntime adds all that it knows
    del model.opset_import[:]
    model.opset_import.extend(imports)
    onnx.checker.check_model(model)
    onnx.save(model, path)


@contextmanager
def _quiet_tools(precision: str) -> Iterator[None]:
    """Without what onnxruntime's tools say of themselves; one sentence where they are missing.

    Raises:
        UsageError: they are.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except ImportError as error:
        raise UsageError(MISSING.format(precision, error)) from error
    finally:
        logging.disable(level)


def loss_of(measured: Mapping[str, Measured], precision: str) -> float:
    """How much of F1 the lower precision loses; negative for a gain."""
    return measured["float32"].F1 - measured[precision].F1
