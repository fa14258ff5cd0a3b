"""The command `export`: what it writes is run beside the module; what does not agree is not written."""

import contextlib
import io
import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_lightning import Batch, load_detector
from dino_lightning.cli import export
from dino_lightning.data.sizes import resized_size
from dino_lightning.data.transforms import resize_pixels
from dino_lightning.detections import Detections
from dino_lightning.export import formats
from dino_lightning.export.check import compare_with_module, difference, drawn, table
from dino_lightning.export.formats import DESCRIPTION_FILE, describe_module, run_onnx, run_torch, write_onnx
from dino_lightning.export.traceable import TraceableDetector, TraceablePreprocessing
from dino_lightning.model.query_selection import QuerySelection
from tests.export.exported import CLASSES, assert_same, images, save, tiny_module


@pytest.fixture(scope="module")
def module():
    return tiny_module()


@pytest.fixture(scope="module")
def checkpoint(module, tmp_path_factory):
    return save(module, tmp_path_factory.mktemp("run") / "best.ckpt")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """An ONNX file that takes prepared images, by the command, and what the command printed."""
    path = tmp_path_factory.mktemp("outside") / "models" / "rooms.onnx"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert export.run(["--ckpt_path", str(checkpoint), "--output", str(path), "--preprocessing", "outside"]) == 0
    return path, printed.getvalue()


@pytest.fixture(scope="module")
def outside(exported):
    return exported[0]


# ------------------------------------------------------------------ the function that is exported


def test_the_traced_function_is_the_module_to_the_last_bit_on_padded_batches(module):
    batch = Batch.from_images(images([(96, 130), (120, 64), (33, 47)]), original_sizes=[(192, 260), (60, 32), (33, 47)])
    with torch.no_grad():
        boxes, scores, labels, _ = TraceableDetector(module.model)(
            module.model.normalize(batch.images), torch.tensor(batch.image_sizes), torch.tensor(batch.original_sizes)
        )
        for index, expected in enumerate(module(batch)):
            assert torch.equal(scores[index], expected.scores)
            assert torch.equal(labels[index], expected.labels)
            torch.testing.assert_close(boxes[index], expected.boxes_xyxy, rtol=1e-6, atol=1e-4)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), short=st.integers(1, 1500), limit=st.integers(1, 2500))
def test_sizes_without_branches_follow_the_rule_of_evaluation(height, width, short, limit):
    preparing = TraceablePreprocessing(PixelStatistics(), image_size=short, max_size=limit)
    assert preparing._resized(height, width) == resized_size((height, width), short, limit)


class PixelStatistics:  # stands for a DINO, of which the preprocessing takes only these
    image_mean = torch.zeros(1, 3, 1, 1)
    image_std = torch.ones(1, 3, 1, 1)


@pytest.mark.parametrize("size", [(333, 251), (96, 130), (700, 500), (40, 60)])
def test_resizing_inside_rounds_at_most_a_pixel_the_other_way(size):
    image = drawn(*size, seed=1)
    new = resized_size(size, 96, 160)
    prepared, sizes, originals = TraceablePreprocessing(PixelStatistics(), image_size=96, max_size=160)(image[None])
    off = (prepared[0] - resize_pixels(image, new)).abs()
    assert sizes.tolist() == [list(new)] and originals.tolist() == [list(size)]
    assert float(off.max()) <= 2 and float(off.mean()) < 0.1


# ------------------------------------------------------------------ how two runs are compared


def found(boxes, scores, labels):
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels))


ONE = found([[10.0, 10.0, 20.0, 30.0], [40.0, 40.0, 60.0, 60.0], [0.0, 0.0, 5.0, 5.0]], [0.9, 0.8, 0.1], [0, 1, 0])


@pytest.mark.parametrize(
    ("other", "boxes", "scores"),
    [
        (ONE, 0, 0),
        (found([[10.0, 10.0, 20.0, 30.7], *ONE.boxes_xyxy.tolist()[1:]], [0.9, 0.8, 0.1], [0, 1, 0]), 0.7, 0),
        (found(ONE.boxes_xyxy.tolist(), [0.9, 0.79, 0.1], [0, 1, 0]), 0, 0.01),
        (found(ONE.boxes_xyxy.tolist()[::2], [0.9, 0.1], [0, 0]), np.inf, np.inf),  # one is missing
        (found([*ONE.boxes_xyxy.tolist(), [0.0, 0.0, 5.0, 5.0]], [0.9, 0.8, 0.1, 0.7], [0, 1, 0, 2]), np.inf, np.inf),
        (found(ONE.boxes_xyxy.tolist(), [0.9, 0.8, 0.1], [0, 2, 0]), np.inf, np.inf),  # another label
        (found(ONE.boxes_xyxy.flip(0).tolist(), [0.1, 0.8, 0.9], [0, 1, 0]), 0, 0),  # another order
        (found([*ONE.boxes_xyxy.tolist()[:2], [70.0, 0.0, 75.0, 5.0]], [0.9, 0.8, 0.1], [0, 1, 0]), 0, 0),  # the last
    ],
)
def test_each_detection_is_compared_with_the_nearest_of_its_label(other, boxes, scores):
    for pair in ((ONE, other), (other, ONE)):
        _, by_box, by_score = difference(*pair)
        assert (by_box, by_score) == (pytest.approx(boxes, abs=1e-5), pytest.approx(scores, abs=1e-5))


# ------------------------------------------------------------------ ONNX


@pytest.mark.slow
def test_onnx_agrees_with_the_module_over_images_of_varied_sizes_in_batches_of_1_3_and_8(module, outside):
    draws = random.Random(0)
    sizes = [(draws.randint(48, 160), draws.randint(48, 160)) for _ in range(20)]
    run, pixels = run_onnx(outside), images(sizes)
    for count in (1, 3, 8):
        for start in range(0, 20, count):
            files = [(2 * height + 1, 3 * width) for height, width in sizes[start : start + count]]
            batch = Batch.from_images(pixels[start : start + count], original_sizes=files)
            with torch.no_grad():
                expected = module(batch)
            values = run(
                module.model.normalize(batch.images),
                torch.tensor(batch.image_sizes),
                torch.tensor(batch.original_sizes),
            )
            assert values[0].shape == (len(batch), 36, 4)
            for index in range(len(batch)):
                assert_same(Detections(*(value[index] for value in values[:3])), expected[index])


@pytest.mark.slow
def test_an_image_with_fewer_tokens_than_queries_gives_fewer(module, outside):
    for size, number in (
        ((33, 17), 24),
        ((33, 33), 36),
    ):  # 3 x 2 and 2 x 1 cells; 3 x 3 and 2 x 2; there are 12 queries
        batch = Batch.from_images(images([size]))
        sizes = torch.tensor(batch.image_sizes)
        values = run_onnx(outside)(module.model.normalize(batch.images), sizes, sizes)
        assert values[1].shape == (1, number)
        with torch.no_grad():
            assert_same(Detections(*(value[0] for value in values[:3])), module(batch)[0])


@pytest.mark.slow
def test_the_file_has_names_ids_threshold_and_open_sizes(outside):
    import onnx

    model = onnx.load(outside)
    stored = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(stored["class_names"]) == CLASSES["class_names"]
    assert json.loads(stored["category_ids"]) == CLASSES["category_ids"]
    assert float(stored["score_threshold"]) == 0.2
    assert (stored["image_size"], stored["max_size"], stored["stretch_to"]) == ("96", "160", "null")
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "image_sizes": ["batch", 2],
        "original_sizes": ["batch", 2],
        "boxes": ["batch", "detections", 4],
        "scores": ["batch", "detections"],
        "labels": ["batch", "detections"],
        "tokens": ["batch", "queries"],
    }


@pytest.mark.slow
def test_the_graph_has_no_sequences_of_tensors(outside):
    import onnx

    operators = {node.op_type for node in onnx.load(outside).graph.node}
    assert "GridSample" in operators and not {name for name in operators if "Sequence" in name}


@pytest.mark.slow
@pytest.mark.parametrize("opset", [19, 20])
def test_newer_operator_sets_agree_too(module, opset, tmp_path):
    write_onnx(module, tmp_path / "model.onnx", describe_module(module, "outside"), opset=opset)
    assert all(row.same for row in compare_with_module(module, run_onnx(tmp_path / "model.onnx")))


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_the_command_shows_what_it_has_compared_and_leaves_one_file(exported):
    path, printed = exported
    title, heading, *rows, last = printed.splitlines()
    assert title.startswith("Largest differences") and heading.split()[0] == "batch"
    assert [row.split()[0] for row in rows] == ["1", "3", "8"]
    assert last == str(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_what_does_not_agree_is_not_written(module, checkpoint, outside, tmp_path, capsys, monkeypatch):
    changed = tiny_module()
    with torch.no_grad():
        changed.model.decoder.class_head.bias += 0.05
    other = save(changed, tmp_path / "other.ckpt")
    monkeypatch.setattr(formats, "write_onnx", lambda module, path, *_, **__: shutil.copyfile(outside, path) and None)
    arguments = ["--output", str(tmp_path / "out" / "model.onnx"), "--preprocessing", "outside"]
    assert export.run(["--ckpt_path", str(other), *arguments]) == 1
    *stages, error = capsys.readouterr().err.splitlines()
    assert [stage.split()[0] for stage in stages] == ["Tracing", "Running"]  # what takes long is said beforehand
    assert error.startswith("error: ") and "does not agree" in error
    assert list((tmp_path / "out").iterdir()) == []
    assert export.run(["--ckpt_path", str(checkpoint), *arguments]) == 0


@pytest.mark.slow
def test_a_pt2_file_agrees_with_the_module(module, checkpoint, tmp_path, capsys):
    path = tmp_path / "best.pt2"
    assert export.run(["--ckpt_path", str(checkpoint), "--output", str(tmp_path), "--format", "torch"]) == 0
    files = {DESCRIPTION_FILE: ""}
    torch.export.load(path, extra_files=files)
    assert json.loads(files[DESCRIPTION_FILE])["class_names"] == CLASSES["class_names"]
    assert all(row.same for row in compare_with_module(module, run_torch(path)))


def test_detections_are_compared_from_the_same_proposals_which_must_be_as_good(module):
    eager = TraceableDetector(module.model)

    def exchange(_, given, named):
        tokens = QuerySelection.forward(module.model.query_selection, *given).token_indices
        return given, {**named, "token_indices": tokens.flip(1)}

    def from_wrong_ranks(*inputs):
        hook = module.model.query_selection.register_forward_pre_hook(exchange, with_kwargs=True)
        try:
            return eager(*inputs)
        finally:
            hook.remove()

    pixels = [images([(96, 130)])]
    (right,) = compare_with_module(module, eager, None, pixels)
    assert right.same and right.exchanged == 0 and right.boxes < 1e-3
    (wrong,) = compare_with_module(module, from_wrong_ranks, None, pixels)
    assert wrong.exchanged == 12 and wrong.boxes < 1e-3 and wrong.proposals > 1e-3 and not wrong.same


def test_a_model_directory_detects_the_same_and_has_the_code_to_serve_it(module, checkpoint, tmp_path, capsys):
    folder = tmp_path / "model"
    arguments = ["--ckpt_path", str(checkpoint), "--output", str(folder), "--format", "directory"]
    assert export.run(arguments) == 0
    assert json.loads((folder / "model.json").read_text())["classes"][2] == {
        "label": 2, "category_id": 90, "name": "kitchen"
    }  # fmt: skip
    for name in ("inference.py", "requirements.txt", "dino_lightning/model/dino.py"):
        assert (folder / "code" / name).is_file()
    image = drawn(100, 140, seed=0)
    (expected,) = module.detect([image])
    (actual,) = load_detector(folder).detect([image])
    assert torch.equal(actual.boxes_xyxy, expected.boxes_xyxy) and torch.equal(actual.scores, expected.scores)
    assert export.run(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("place", ["checkpoints/best.ckpt", "best.ckpt"])
def test_a_model_directory_has_results_of_a_run_of_ours_only(module, tmp_path, place):
    """It is made to be sent: what lies near a checkpoint by chance may be a secret."""
    (tmp_path / "project" / "checkpoints").mkdir(parents=True)
    (tmp_path / "project" / "config.yaml").write_text("database: {password: hunter2}")
    (tmp_path / "project" / "metrics.csv").write_text("epoch,val/AP\n3,0.987\n")
    checkpoint = save(module, tmp_path / "project" / place)
    arguments = ["--format", "directory", "--ckpt_path", str(checkpoint), "--output"]
    assert export.run([*arguments, str(tmp_path / "foreign")]) == 0
    assert sorted(path.name for path in (tmp_path / "foreign").iterdir()) == ["code", "model.ckpt", "model.json"]
    assert json.loads((tmp_path / "foreign" / "model.json").read_text())["metrics"] == {}
    if "/" in place:
        (tmp_path / "project" / "run.json").write_text("{}")
        assert export.run([*arguments, str(tmp_path / "ours")]) == 0
        assert (tmp_path / "ours" / "config.yaml").is_file()
        again = ["--format", "directory", "--ckpt_path", str(tmp_path / "ours"), "--output", str(tmp_path / "again")]
        assert export.run(again) == 0
        assert json.loads((tmp_path / "again" / "model.json").read_text())["metrics"] == {"val/AP": 0.987}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "--ckpt_path"),
        (["--ckpt_path", "no.ckpt"], 1, "no.ckpt does not exist"),
        (["--ckpt_path", "no.ckpt", "--opset", "12"], 2, "16 to 20"),
        (["--ckpt_path", "no.ckpt", "--opset", "16"], 2, "no resizing with antialiasing"),
        (["--ckpt_path", "no.ckpt", "--opset", "18", "--format", "torch"], 2, "--opset is for onnx and openvino"),
        (["--ckpt_path", "no.ckpt", "--static", "640"], 2, "such as 640x640"),
        (["--ckpt_path", "no.ckpt", "--static", "640x0"], 2, "from 32 to 4096 pixels"),
        (["--ckpt_path", "no.ckpt", "--static", "640x640", "--format", "torch"], 2, "leaves sizes open"),
        (["--ckpt_path", "no.ckpt", "--format", "directory", "--preprocessing", "inside"], 2, "is for files"),
        (["--ckpt_path", "no.ckpt", "--format", "openvino", "--output", "model.bin"], 1, "must end in .xml"),
        (["--ckpt_path", "no.ckpt", "--format", "openvino", "--preprocessing", "inside"], 2, "with --static only"),
        (["--ckpt_path", "no.ckpt", "--format", "torch", "--preprocessing", "inside"], 2, "inside is for"),
        (["--ckpt_path", "no.ckpt", "--output", "model.pb"], 1, "must end in .onnx"),
        (["--ckpt_path", "model.onnx"], 1, "is an exported file (ONNX)"),
        (["--ckpt_path", "no.ckpt", "--ncnn"], 2, "--ncnn"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, code, said, capsys):
    assert export.run(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_missing_openvino_is_named_before_the_model_is_traced(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    arguments = ["--ckpt_path", str(checkpoint), "--output", str(tmp_path), "--format", "openvino"]
    assert export.run(arguments) == 1
    assert 'pip install "dino-lightning[openvino]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export.run(["--ckpt_path", str(checkpoint), "--output", str(tmp_path)]) == 1
    assert 'pip install "dino-lightning[export]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_stretched_model_is_stretched_inside(tmp_path):
    preparing = TraceablePreprocessing(PixelStatistics(), image_size=96, max_size=160, stretch_to=64)
    prepared, sizes, originals = preparing(drawn(50, 90, seed=0)[None])
    assert prepared.shape == (1, 3, 64, 64) and sizes.tolist() == [[64, 64]] and originals.tolist() == [[50, 90]]


@pytest.mark.slow
def test_the_table_says_what_differs(module, outside):
    rows = compare_with_module(module, run_onnx(outside), None, [images([(64, 80), (96, 96)])])
    assert (rows[0].batch, rows[0].size) == (2, (96, 120)) and rows[0].same
    lines = table([*rows, rows[0]._replace(size=(1333, 1333), detections=99999, boxes=1333.0)]).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 80
