"""An exported ONNX file used from Python, as a checkpoint is."""

import builtins

import numpy as np
import pytest
from PIL import Image

from dino_lightning import load_detector
from dino_lightning.cli import export
from dino_lightning.errors import CheckpointError
from dino_lightning.export.onnx_model import OnnxModel
from tests.export.exported import CLASSES, assert_same, images, save, tiny_module


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module", params=[pytest.param(place, marks=pytest.mark.slow) for place in ("inside", "outside")])
def model(request, module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    checkpoint = save(module, folder / "best.ckpt")
    arguments = ["--ckpt_path", str(checkpoint), "--output", str(folder), "--preprocessing", request.param]
    assert export.run(arguments) == 0
    return OnnxModel(folder / "best.onnx")


def test_it_knows_its_classes_threshold_and_sizes(model):
    assert list(model.class_names) == CLASSES["class_names"] and list(model.category_ids) == CLASSES["category_ids"]
    assert (model.score_threshold, model.image_size, model.max_size, model.stretch_to) == (0.2, 96, 160, None)


def test_it_detects_what_the_checkpoint_does_in_images_of_any_kind(model, module, tmp_path):
    pixels = images([(96, 130)])[0]  # not resized: resizing inside may round a pixel the other way
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    Image.fromarray(array).save(tmp_path / "plan.png")
    (expected,) = module.detect([pixels], threshold=0.0)
    for found in model.detect([pixels, array, Image.fromarray(array), tmp_path / "plan.png"], threshold=0.0):
        assert_same(found, expected)
        assert found.names and set(found.names) <= set(CLASSES["class_names"])
        assert {entry["category_id"] for entry in found.to_coco(1)} <= set(CLASSES["category_ids"])


def test_without_a_threshold_it_takes_its_own(model):
    (found,) = model.detect(images([(96, 130)]))
    assert len(found) and float(found.scores.min()) >= 0.2


def test_sizes_can_be_others_unless_it_resizes_by_itself(model, module):
    picture = images([(150, 200)])
    if model.preprocessing == "inside":
        with pytest.raises(ValueError, match="--preprocessing outside"):
            model.detect(picture, image_size=128)
        return
    for sizes in ({}, {"image_size": 128}, {"image_size": 128, "max_size": 140}):
        (expected,) = module.detect(picture, threshold=0.0, **sizes)
        assert_same(model.detect(picture, threshold=0.0, **sizes)[0], expected)


def test_load_detector_takes_it(model, module):
    detector = load_detector(model.path)
    assert list(detector.class_names) == CLASSES["class_names"] and detector.score_threshold == 0.2
    assert_same(detector(images([(96, 130)])[0], threshold=0.0), module.detect(images([(96, 130)]), threshold=0.0)[0])


@pytest.mark.slow
def test_non_maximum_suppression_is_part_of_the_file(module, tmp_path):
    suppressing = tiny_module(nms_iou_threshold=0.4)
    file = save(suppressing, tmp_path / "suppressing.ckpt")
    assert export.run(["--ckpt_path", str(file), "--output", str(tmp_path / "suppressing.onnx")]) == 0
    model = OnnxModel(tmp_path / "suppressing.onnx")
    for image in images([(96, 130), (96, 96), (140, 96)]):  # not resized
        (expected,), (every,) = (one.detect([image], threshold=0.0) for one in (suppressing, module))
        assert len(expected) < len(every)
        assert_same(model.detect([image], threshold=0.0)[0], expected)


def test_files_that_are_none_are_refused_in_one_sentence(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    with pytest.raises(CheckpointError, match="does not exist"):
        OnnxModel(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(CheckpointError, match=r"text\.onnx cannot be run by onnxruntime"):
        OnnxModel(tmp_path / "text.onnx")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", [value], [result])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match="not written by"):
        OnnxModel(tmp_path / "other.onnx")


def test_a_missing_onnxruntime_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=r"dino-lightning\[export\]"):
        OnnxModel(tmp_path / "model.onnx")
