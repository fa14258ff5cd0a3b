"""Exported files in the runtimes they are for: which operators they use, and that each gives the checkpoint's boxes."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dino_lightning import Batch, load_detector
from dino_lightning.cli import export
from dino_lightning.data.images import to_pixels
from dino_lightning.errors import CheckpointError
from dino_lightning.export.exported_model import ImageRule
from dino_lightning.export.openvino_model import OpenVinoModel
from dino_lightning.floor_plans.dataset import draw_plan
from dino_lightning.training.test_time_augmentation import detect_in_views, fuse, orientations
from tests.export.exported import CLASSES, assert_same, images, save, tiny_module

# Each is one that onnxruntime, OpenVINO and TensorRT 10 have; a new one needs a look at docs/tensorrt.md.
COMMON = {
    "Add", "And", "Cast", "Clip", "Concat", "Conv", "Div", "Equal", "Expand", "Flatten", "Floor", "Gather",
    "GatherElements", "Gemm", "Greater", "GreaterOrEqual", "GridSample", "Identity", "InstanceNormalization",
    "LayerNormalization", "Less", "LessOrEqual", "Log", "MatMul", "Max", "MaxPool", "Min", "Mod", "Mul", "Not", "Pow",
    "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Sigmoid", "Sin", "Cos",
    "Slice", "Softmax", "Sqrt", "Squeeze", "Sub", "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
OF_OPEN_SIZES = {"Range", "Shape"}
OF_RESIZING = {"Resize", "Round"}
FORMS = {
    "inside.onnx": [],
    "outside.onnx": ["--preprocessing", "outside"],
    "canvas.onnx": ["--static", "128x160", "--opset", "16"],
    "padded.onnx": ["--static", "160x160", "--preprocessing", "outside"],
    "outside.xml": ["--format", "openvino", "--preprocessing", "outside"],
    "padded.xml": ["--format", "openvino", "--static", "160x160", "--preprocessing", "outside"],
    "outside.pt2": ["--format", "torch"],
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    place = tmp_path_factory.mktemp("forms")
    save(module, place / "best.ckpt")
    (place / "job").mkdir()
    (place / "run" / "checkpoints").mkdir(parents=True)
    save(module, place / "run" / "checkpoints" / "best.ckpt")
    save(module, place / "job" / "model.ckpt")
    return place


@pytest.fixture(scope="module")
def form(folder):
    """By its name, one of `FORMS`, written by the command at its first use; skips where its packages are absent."""

    def written(name):
        pytest.importorskip("onnxruntime")
        if name.endswith(".xml"):
            pytest.importorskip("openvino")
        path = folder / name
        if not path.exists():
            assert export.run(["--ckpt_path", str(folder / "best.ckpt"), "--output", str(path), *FORMS[name]]) == 0
        return path

    return written


def operators(path):
    import onnx

    graph = onnx.load(path).graph
    assert not any(entry.HasField("g") for node in graph.node for entry in node.attribute)  # no branches and loops
    assert not any(node.domain for node in graph.node)  # of ONNX itself, no contributed ones
    return {node.op_type for node in graph.node}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("inside.onnx", OF_OPEN_SIZES | OF_RESIZING),
        ("outside.onnx", OF_OPEN_SIZES),
        ("padded.onnx", set()),
        ("canvas.onnx", set()),
    ],
)
def test_the_graph_has_no_operators_but_those_that_were_looked_at(form, name, more):
    used = operators(form(name))
    assert "GridSample" in used and used - COMMON - more == set()


def test_a_static_graph_without_sizes_among_its_inputs_computes_none_of_them(form):
    assert not operators(form("canvas.onnx")) & {"Shape", "Range", "Less", "And", "LayerNormalization"}


def test_non_maximum_suppression_adds_one_kind_of_operator(tmp_path):
    checkpoint = save(tiny_module(nms_iou_threshold=0.4), tmp_path / "suppressing.ckpt")
    arguments = ["--ckpt_path", str(checkpoint), "--output", str(tmp_path), "--static", "96x128"]
    assert export.run(arguments) == 0
    assert operators(tmp_path / "suppressing.onnx") - COMMON == {"Trilu"}


@pytest.mark.parametrize(
    "name", ["outside.onnx", "padded.onnx", "outside.xml", "padded.xml", "outside.pt2", "run", "job"]
)
def test_every_form_gives_the_same_boxes_in_20_plans_of_varied_sizes(module, form, folder, name):
    detector = load_detector(form(name) if name in FORMS else folder / name, device="cpu")
    assert detector.class_names == tuple(CLASSES["class_names"]) and detector.score_threshold == 0.2
    draws = random.Random(1)
    for seed in range(20):
        plan = draw_plan(seed, size=draws.randint(100, 330))[0]
        (expected,) = module.detect([plan], threshold=0.0)
        if name.startswith("padded"):
            expected = in_canvas(module, detector.model.rule, plan)
        assert_same(detector(plan, threshold=0.0), expected)


@pytest.mark.parametrize("name", ["outside.onnx", "padded.onnx", "outside.xml", "padded.xml", "outside.pt2"])
def test_every_form_gives_the_same_boxes_in_eight_views(module, form, name):
    detector = load_detector(form(name), device="cpu")
    for seed in range(4):
        plan = draw_plan(seed, size=150 + 40 * seed)[0]
        (expected,) = module.detect([plan], threshold=0.0, tta_views=8)
        if name.startswith("padded"):
            expected = in_canvas(module, detector.model.rule, plan, views=8)
        assert_same(detector(plan, threshold=0.0, tta_views=8), expected)


@pytest.mark.parametrize("name", ["outside.onnx", "outside.xml", "outside.pt2"])
@pytest.mark.parametrize("size", [(30, 96), (12, 300), (300, 9), (1, 40)], ids=str)
def test_strips_narrower_than_a_cell_of_the_coarsest_level_are_images_too(module, form, name, size):
    strip = images([size])[0]
    (expected,) = module.detect([strip], threshold=0.0)
    assert_same(load_detector(form(name), device="cpu")(strip, threshold=0.0), expected)


def test_the_number_of_a_gpu_and_one_that_cannot_be_started(form, monkeypatch):
    """Without a GPU: a session that says what it was asked for, and starts on the CPU as onnxruntime does then."""
    onnxruntime = pytest.importorskip("onnxruntime")
    asked, real = [], onnxruntime.InferenceSession

    def started(content, settings, providers):
        asked.append(providers)
        return real(content, settings, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", started)
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(CheckpointError, match="could not start CUDAExecutionProvider here"):
            load_detector(form("outside.onnx"), device=device)
    assert asked == [["CUDAExecutionProvider"], [("CUDAExecutionProvider", {"device_id": 1})]]
    assert load_detector(form("outside.onnx")).class_names == tuple(CLASSES["class_names"])  # unasked, the CPU will do


def test_a_canvas_that_is_no_square_takes_eight_views_of_any_shape(form):
    detector, image = load_detector(form("canvas.onnx")), images([(200, 333)])[0]
    stretched, views = tiny_module(image_size=128, max_size=160), []
    for way in orientations(8):
        (found,) = stretched.detect([detector.model.rule.resized(way.seen(image))], threshold=0.0)
        height, width = way.size((200, 333))
        found.boxes_xyxy.mul_(torch.tensor([width / 160, height / 128]).repeat(2))
        views.append(way.back(found, (200, 333)))
    assert_same(detector(image, threshold=0.0, tta_views=8), fuse(views).within((200, 333)))


def in_canvas(module, rule, image, views=1):
    """What the module finds in an image as one of a batch that is padded to the canvas."""
    pixels = to_pixels(image)
    resized, size = rule.resized(pixels), (int(pixels.shape[1]), int(pixels.shape[2]))
    assert resized.shape[1] <= 160 and resized.shape[2] <= 160
    batch = replace(Batch.from_images([resized], original_sizes=[size]), images=rule.padded(resized)[None])
    with torch.no_grad():
        return detect_in_views(module, batch, views)[0].within(size)


def test_a_canvas_takes_stretched_images_and_gives_boxes_in_pixels_of_the_file(module, form):
    detector, image = load_detector(form("canvas.onnx")), images([(200, 333)])[0]
    resized = detector.model.rule.resized(image)
    assert resized.shape == (3, 128, 160)
    (expected,) = tiny_module(image_size=128, max_size=160).detect([resized], threshold=0.0)
    scale = torch.tensor([333 / 160, 200 / 128]).repeat(2)
    expected.boxes_xyxy.mul_(scale)
    assert_same(detector(image, threshold=0.0), expected)
    with pytest.raises(ValueError, match="sizes of images are fixed"):
        detector(image, image_size=64)


@pytest.mark.parametrize("opset", range(16, 21))
def test_every_operator_set_runs_and_is_what_was_asked_for(folder, tmp_path, opset):
    import onnx

    path = tmp_path / "model.onnx"
    arguments = ["--ckpt_path", str(folder / "best.ckpt"), "--output", str(path), "--preprocessing", "outside"]
    assert export.run([*arguments, "--opset", str(opset)]) == 0  # which compares it with the checkpoint
    assert {entry.version for entry in onnx.load(path).opset_import if entry.domain == ""} == {opset}


def test_opencv_reads_a_canvas(form):
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless")
    if int(cv2.__version__.split(".")[0]) < 5:
        pytest.skip(f"OpenCV {cv2.__version__} has no GridSample; 5 and later have")
    import onnxruntime

    path, image = form("canvas.onnx"), images([(128, 160)])[0][None].numpy()
    expected = onnxruntime.InferenceSession(str(path)).run(["boxes", "scores"], {"images": image})
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(image, "images")
    boxes, scores, *_ = network.forward(["boxes", "scores", "labels", "tokens"])
    np.testing.assert_allclose(scores.reshape(expected[1].shape), expected[1], atol=1e-3)
    np.testing.assert_allclose(boxes.reshape(expected[0].shape), expected[0], atol=0.5)


def test_openvino_files_have_the_same_metadata_and_refuse_what_is_missing(form, tmp_path):
    path = form("outside.xml")
    model = OpenVinoModel(path)
    assert model.rule == ImageRule("outside", 96, 160) and list(model.category_ids) == CLASSES["category_ids"]
    (tmp_path / "alone.xml").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"alone\.bin does not exist"):
        OpenVinoModel(tmp_path / "alone.xml")
    with pytest.raises(CheckpointError, match="cannot be run by OpenVINO on TPU"):
        load_detector(path, provider="TPU")
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        load_detector(path, precision="int4")


TWO_DETECTORS = """
import gc, os, signal, sys
from dino_lightning import load_detector
first, second = load_detector(sys.argv[1]), load_detector(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
for name in ("first", "second"):
    del globals()[name]
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_two_openvino_detectors_are_gone_is_handled(form):
    """OpenVINO's own plugins, unloaded in the order of loading, leave a freed stack for signals."""
    command = [sys.executable, "-c", TWO_DETECTORS, str(form("outside.xml"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_openvino_files_are_written_both_or_none(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    arguments = ["--ckpt_path", str(folder / "best.ckpt"), "--format", "openvino", "--static", "128x128"]
    assert export.run([*arguments, "--output", str(tmp_path / "a.xml")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.xml"]
    monkeypatch.setattr("dino_lightning.export.check.SCORE_TOLERANCE", -1.0)
    assert export.run([*arguments, "--output", str(tmp_path / "b.xml")]) == 1
    assert "b.xml is not written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.xml"]
