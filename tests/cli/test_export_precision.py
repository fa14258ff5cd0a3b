"""`export --precision`: accuracy and latency before and after, and what loses too much is not written."""

import gc
import json
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from dino_lightning import load_detector
from dino_lightning.cli import export
from dino_lightning.export.check import drawn
from tests.export.exported import CLASSES, save, tiny_module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tiny_module(), tmp_path_factory.mktemp("run") / "best.ckpt")


@pytest.fixture(scope="module")
def dataset(checkpoint, tmp_path_factory):
    """Images whose boxes are the best that the checkpoint finds in them, so that its F1 is high."""
    root, detector = tmp_path_factory.mktemp("dataset"), load_detector(checkpoint)
    categories = [
        {"id": key, "name": name} for key, name in zip(CLASSES["category_ids"], CLASSES["class_names"], strict=True)
    ]
    for split, seeds in (("train", range(2)), ("val", range(2, 8))):
        (root / split).mkdir()
        images, annotations = [], []
        for seed in seeds:
            path = root / split / f"{seed}.png"
            Image.fromarray(drawn(80 + seed, 100, seed).permute(1, 2, 0).numpy()).save(path)
            images.append({"id": seed, "file_name": path.name, "width": 100, "height": 80 + seed})
            found = detector(path, threshold=0.0)
            for box, label in zip(found.boxes_xyxy[:5].tolist(), found.labels[:5].tolist(), strict=True):
                corner = {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "iscrowd": 0}
                area = corner["bbox"][2] * corner["bbox"][3]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": seed, "area": area, **corner}
                    | {"category_id": CLASSES["category_ids"][label]}
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / split / "annotations.json").write_text(json.dumps(content))
    return root


def metadata(path):
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def exported(checkpoint, output, *options):
    return export.run(["--ckpt_path", str(checkpoint), "--output", str(output), "--preprocessing", "outside", *options])


@pytest.mark.slow
def test_what_fp16_costs_is_printed_and_stored_and_the_file_detects_the_same(checkpoint, dataset, tmp_path, capsys):
    assert exported(checkpoint, tmp_path, "--precision", "fp16", "--data.root", str(dataset)) == 0
    path = tmp_path / "best.onnx"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(path) and [line.split()[0] for line in lines[-3:-1]] == ["float32", "fp16"]
    stored = metadata(path)
    accuracy = json.loads(stored["accuracy"])
    assert stored["precision"] == "fp16" and accuracy["images"] == 6
    for name, line in zip(("float32", "fp16"), lines[-3:-1], strict=True):
        assert [f"{accuracy[name][value]:.4f}" for value in ("AP", "AP50", "F1")] == line.split()[1:4]
        assert accuracy[name]["F1"] > 0.8 and accuracy[name]["ms"] > 0
    before, after = (load_detector(file)(dataset / "val" / "2.png", threshold=0.0) for file in (checkpoint, path))
    assert abs(float(before.scores[0] - after.scores[0])) < 0.01
    assert float((before.boxes_xyxy[0] - after.boxes_xyxy[0]).abs().max()) < 0.5


@pytest.mark.slow
def test_openvino_stores_weights_in_fp16_and_what_that_costs(checkpoint, dataset, tmp_path, capsys):
    openvino = pytest.importorskip("openvino")
    options = ("--format", "openvino", "--precision", "fp16", "--data.root", str(dataset))
    # random weights: a box or two of 30 change, which may be more than half a point
    assert exported(checkpoint, tmp_path / "half", *options, "--accept-loss") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == ["float32", "fp16"]
    assert exported(checkpoint, tmp_path / "full", "--format", "openvino") == 0
    assert sorted(file.name for file in (tmp_path / "half").iterdir()) == ["best.bin", "best.xml"]
    half, full = ((tmp_path / name / "best.bin").stat().st_size for name in ("half", "full"))
    assert half < 0.6 * full
    path = tmp_path / "half" / "best.xml"
    stored = openvino.Core().read_model(path)
    assert stored.get_rt_info(["dino_lightning", "precision"]).astype(str) == "fp16"
    accuracy = json.loads(stored.get_rt_info(["dino_lightning", "accuracy"]).astype(str))
    assert accuracy["images"] == 6 and min(accuracy[name]["F1"] for name in ("float32", "fp16")) > 0.8
    before, after = (load_detector(file)(dataset / "val" / "2.png", threshold=0.0) for file in (checkpoint, path))
    assert 0 < abs(float(before.scores[0] - after.scores[0])) < 0.01
    assert float((before.boxes_xyxy[0] - after.boxes_xyxy[0]).abs().max()) < 0.5


@pytest.mark.slow
def test_int8_that_loses_more_than_half_a_point_is_not_written_unless_accepted(checkpoint, dataset, tmp_path, capsys):
    options = ("--precision", "int8", "--data.root", str(dataset))  # random weights lose nearly all
    assert exported(checkpoint, tmp_path / "out", *options) == 1
    *stages, error = capsys.readouterr().err.splitlines()
    assert any(stage.startswith("Converting products with weights to 8 bits") for stage in stages)
    assert error.startswith("error: ") and "points of F1 on 6 validation images" in error and "--accept-loss" in error
    assert list((tmp_path / "out").iterdir()) == []
    assert exported(checkpoint, tmp_path / "out", *options, "--accept-loss") == 0
    (path,) = (tmp_path / "out").iterdir()
    accuracy = json.loads(metadata(path)["accuracy"])
    assert accuracy["float32"]["F1"] - accuracy["int8"]["F1"] > 0.005
    assert len(load_detector(path)(dataset / "val" / "2.png", threshold=0.0)) > 0


@pytest.mark.slow
def test_openvino_in_8_bits_follows_the_same_rule_and_stores_the_same(
    checkpoint, dataset, tmp_path, capfd, monkeypatch
):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf", reason="needs nncf, of the extra openvino-int8")
    options = ("--format", "openvino", "--static", "96x128", "--precision", "int8", "--data.root", str(dataset))
    arguments = ["--ckpt_path", str(checkpoint), "--output", str(tmp_path / "out"), *options]
    handled = []
    signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
    monkeypatch.setattr("dino_lightning.export.fewer_bits.LARGEST_LOSS", -1.0)  # so that any loss is too much
    assert export.run(arguments) == 1
    *stages, error = capfd.readouterr().err.splitlines()
    assert [stage.split()[0] for stage in stages[:3]] == ["Tracing", "Running", "Converting"]
    assert "points of F1 on 6 validation images" in error and "--accept-loss" in error
    assert list((tmp_path / "out").iterdir()) == []
    assert export.run([*arguments, "--accept-loss"]) == 0
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert "warning" not in said.err.lower() and [line.split()[0] for line in lines[-3:-1]] == ["float32", "int8"]
    path = tmp_path / "out" / "best.xml"
    assert sorted(file.name for file in path.parent.iterdir()) == ["best.bin", "best.xml"]
    stored = openvino.Core().read_model(path)
    assert stored.get_rt_info(["dino_lightning", "precision"]).astype(str) == "int8"
    accuracy = json.loads(stored.get_rt_info(["dino_lightning", "accuracy"]).astype(str))
    assert [f"{accuracy['int8'][name]:.4f}" for name in ("AP", "AP50", "F1")] == lines[-2].split()[1:4]
    constants = [operation for operation in stored.get_ops() if operation.get_type_name() == "Constant"]
    kinds = [constant.get_output_element_type(0).get_type_name() for constant in constants]
    assert kinds.count("i8") > 10  # weights in 8 bits
    assert len(load_detector(path)(dataset / "val" / "2.png", threshold=0.0)) > 0
    del stored
    gc.collect()
    signal.raise_signal(signal.SIGUSR1)  # kills this process if nncf has left a freed stack for signals
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert handled == [signal.SIGUSR1]


def test_a_missing_nncf_is_named_before_the_model_is_traced(checkpoint, dataset, tmp_path, capsys, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)
    options = ("--format", "openvino", "--precision", "int8", "--data.root", str(dataset))
    assert exported(checkpoint, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert 'pip install "dino-lightning[openvino-int8]"' in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "best.xml").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--precision", "int8", "--format", "torch"), 2, "--precision is for onnx and openvino"),
        (("--precision", "int8", "--format", "directory"), 2, "--precision is for onnx and openvino"),
        (("--precision", "int4"), 2, "int4"),
        (("--accept-loss",), 2, "go with --precision"),
        (("--data.root", "plans"), 2, "go with --precision"),
        (("--precision", "int8"), 1, "give their dataset by --data.root DIR"),
    ],
)
def test_wrong_combinations_get_one_sentence(checkpoint, options, code, said, tmp_path, capsys):
    assert export.run(["--ckpt_path", str(checkpoint), "--output", str(tmp_path), *options]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dataset_of_other_classes_is_refused(tmp_path, dataset, capsys):
    module = tiny_module()
    module.hparams["class_names"] = ["room", "door", "bath"]
    other = save(module, tmp_path / "other.ckpt")
    assert exported(other, tmp_path / "out", "--precision", "int8", "--data.root", str(dataset)) == 1
    error = capsys.readouterr().err
    assert "are not those of" in error and error.count("\n") == 1


def test_what_is_said_of_the_dataset_is_one_line(checkpoint, dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "data")
    for path in (root / "train" / "annotations.json", root / "val" / "annotations.json"):
        content = json.loads(path.read_text())
        content["categories"] = [{"id": entry["id"], "name": f"other {entry['id']}"} for entry in content["categories"]]
        path.write_text(json.dumps(content))
    shutil.copy(path, root / "val" / "further.json")
    command = [sys.executable, "-m", "dino_lightning", "export", "--ckpt_path", str(checkpoint), "--precision", "int8"]
    done = subprocess.run([*command, "--data.root", str(root)], cwd=tmp_path, capture_output=True, text=True)
    warning, error = done.stderr.splitlines()
    assert warning.startswith(f"warning: {root}: val/further.json looks like a COCO file")
    assert done.returncode == 1 and error.startswith("error: The classes of ")
