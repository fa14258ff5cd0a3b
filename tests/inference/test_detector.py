"""`load_detector`, and detections that are printed, drawn and handed on."""

import base64
import io
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lightning import Detections, Detector, DINOModule, load_detector
from dino_lightning.data.images import read_image
from dino_lightning.errors import CheckpointError, UsageError
from dino_lightning.inference.tiling import views
from tests.conftest import TINY_SIZES
from tests.inference.test_tiling import seen


def save_tiny(path, **changes):
    """A checkpoint of a tiny detector with random weights, whose threshold some of its detections pass."""
    torch.manual_seed(0)
    arguments = {
        "num_classes": 2,
        "class_names": ["room", "bath"],
        "category_ids": [7, 3],
        "image_size": 64,
        "max_size": 96,
        "backbone_weights": None,
        **TINY_SIZES,
        **changes,
    }
    module = DINOModule(**arguments)
    with torch.no_grad():  # scores that differ, some of them high
        module.model.decoder.class_head.weight.normal_(std=0.3)
        module.model.decoder.class_head.bias.zero_()
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"state_dict": module.state_dict(), "hyper_parameters": arguments, "score_threshold": 0.6}
    torch.save({**stored, "pytorch-lightning_version": "2.5.0", "epoch": 0, "global_step": 1}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "best.ckpt")


@pytest.fixture(scope="module")
def plan(rooms):
    return rooms / "val" / "images" / "000001.png"


def test_one_image_or_many_of_any_kind(checkpoint, plan):
    detector = load_detector(checkpoint)
    found = detector(plan)
    assert isinstance(found, Detections) and len(found) > 0 and (found.scores >= 0.6).all()
    assert found.file == str(plan)
    with Image.open(plan) as image:
        kinds = [str(plan), image.convert("RGB"), np.asarray(image.convert("RGB")), read_image(plan)]
    for other in detector(kinds):
        torch.testing.assert_close(other.boxes_xyxy, found.boxes_xyxy)
    everything = detector(plan, threshold=0.0)
    assert len(everything) > len(found)
    assert len(detector.detect([plan], threshold=0.0)[0]) == len(everything)
    assert detector([]) == []


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (None, "got NoneType; could a file not be read"),  # what OpenCV gives for a wrong path
        (b"bytes", "got bytes"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), r"got shape \(2, 4, 4, 3\)"),
        (np.zeros((4, 4, 3), dtype=np.float32), "of float32"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "got one of 0 x 4 pixels"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "are torch.int64; they must be uint8 0-255, or floating 0-1"),
        (torch.full((3, 4, 4), 255.0), "go from 255 to 255; floating ones must be 0-1"),
        (torch.randn(3, 40, 40) * 2, "and not normalised"),
        (torch.full((3, 4, 4), float("nan")), "go from nan to nan"),
    ],
    ids=["none", "bytes", "batch", "float array", "empty", "int64", "0-255", "normalised", "nan"],
)
def test_what_is_no_image_is_said(checkpoint, image, said):
    with pytest.raises(ValueError, match=said):
        load_detector(checkpoint, "cpu").detect([image])


def test_a_threshold_is_any_kind_of_number(checkpoint, plan):
    detector = load_detector(checkpoint, "cpu")
    expected = detector(plan, threshold=0.5)
    for threshold in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert len(detector(plan, threshold=threshold)) == len(expected) > 0
    for threshold in (True, "0.5", 1.5, float("nan"), torch.tensor([0.5]), np.array([0.5])):
        with pytest.raises(UsageError, match="must be a number between 0 and 1"):
            detector(plan, threshold=threshold)


def test_a_detector_knows_its_classes(checkpoint):
    detector = load_detector(checkpoint, "cpu")
    assert detector.class_names == ("room", "bath") and detector.category_ids == (7, 3)
    assert detector.score_threshold == 0.6 and not detector.module.training
    assert detector.to("cpu") is detector
    assert repr(detector) == "Detector(2 classes: room, bath; score_threshold 0.600)"


def test_a_model_without_names_numbers_its_classes(tmp_path):
    detector = load_detector(save_tiny(tmp_path / "a.ckpt", class_names=None, category_ids=None))
    assert detector.class_names == ("0", "1") and detector.category_ids == (0, 1)


@pytest.mark.parametrize("place", ["model.ckpt", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "best.ckpt"])
def test_a_folder_stands_for_its_model(checkpoint, tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(checkpoint.read_bytes())
    (tmp_path / "model.json").write_text("{}")
    assert load_detector(tmp_path).class_names == ("room", "bath")


def test_the_best_checkpoint_of_a_run_is_taken(checkpoint, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    assert isinstance(load_detector(tmp_path), Detector)


def test_options_that_a_file_has_no_use_for_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"provider is for \.onnx and \.xml files"):
        load_detector(checkpoint, provider="CPUExecutionProvider")
    with pytest.raises(ValueError, match=r"precision is for \.xml files"):
        load_detector(tmp_path / "model.onnx", precision="bfloat16")
    with pytest.raises(ValueError, match="choose cpu or cuda"):
        load_detector(tmp_path / "model.onnx", device="mps")
    for name in ("model.onnx", "model.xml", "model.pt2"):
        with pytest.raises(CheckpointError, match=rf"{name}.* does not exist"):
            load_detector(tmp_path / name)
    (tmp_path / "model.pt2").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"model\.pt2 is not a file of torch\.export"):
        load_detector(tmp_path)


def test_what_holds_no_model_is_said_in_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model; looked for model\.ckpt"):
        load_detector(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several ONNX files \(a\.onnx, b\.onnx\)"):
        load_detector(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_detector(tmp_path / "nowhere.ckpt")
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt"):
        load_detector(tmp_path / "other.ckpt")


class Eyes:
    """A model that sees the red and the blue rectangles of a page, as far as they are in what it is given."""

    score_threshold = 0.5

    def detect(self, images, *, threshold=None):
        found = []
        for pixels in images:
            boxes, labels = [], []
            for label, channel in enumerate((0, 2)):
                rows, columns = torch.nonzero((pixels[channel] == 255) & (pixels[1] == 0), as_tuple=True)
                if len(rows):
                    boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                    labels.append(label)
            boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            found.append(Detections(boxes, torch.full((len(boxes),), 0.9), torch.tensor(labels, dtype=torch.int64)))
        return found


def test_a_scan_in_tiles_gives_boxes_of_the_scan(tmp_path):
    page = np.full((700, 1100, 3), 255, dtype=np.uint8)
    page[100:150, 280:330] = (255, 0, 0)  # across the edge of a tile
    page[50:600, 30:900] = np.where(page[50:600, 30:900] == 255, (0, 0, 255), page[50:600, 30:900])  # larger than one
    page[100:150, 280:330] = (255, 0, 0)
    Image.fromarray(page).save(tmp_path / "scan.png")
    detector = Detector(model=Eyes(), class_names=("red", "blue"), category_ids=(1, 2))
    (found,) = detector.detect([tmp_path / "scan.png"], tile=300, overlap=0.3)
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([[280.0, 100, 330, 150], [30, 50, 900, 600]]))
    with pytest.raises(TypeError, match="ONNX"):
        _ = detector.module


def test_tiles_no_smaller_than_the_image_change_nothing(checkpoint, plan):
    detector = load_detector(checkpoint)
    torch.testing.assert_close(detector(plan, tile=500).boxes_xyxy, detector(plan).boxes_xyxy)


# ------------------------------------------------------------------ detections


@pytest.fixture
def found():
    return Detections(
        torch.tensor([[10.0, 20.0, 60.0, 80.0], [0.0, 0.0, 99.0, 49.5]]),
        torch.tensor([0.9, 0.25]),
        torch.tensor([1, 0]),
        ("room", "bath"),
        (7, 3),
        file="plans/a.png",
    )


def test_detections_print_as_a_table(found):
    assert repr(found).splitlines() == [
        "2 detections in plans/a.png",
        "  name  score      x1      y1      x2      y2",
        "  bath  0.900      10      20      60      80",
        "  room  0.250       0       0      99      50",
    ]
    assert str(found) == repr(found)
    assert repr(found.above(0.95)) == "no detections in plans/a.png"
    assert repr(found.above(0.5)).startswith("1 detection in plans/a.png\n")
    many = Detections(torch.zeros(30, 4), torch.ones(30), torch.zeros(30, dtype=torch.int64), ("x" * 40 + "\n",))
    assert repr(many).splitlines()[-1] == "  ... and 10 more"
    assert all(len(line) < 80 for line in repr(many).splitlines())


def test_detections_as_values_for_other_programs(found):
    assert found.to_dict() == {
        "file": "plans/a.png",
        "detections": [
            {"name": "bath", "category_id": 3, "score": pytest.approx(0.9), "box": [10, 20, 60, 80]},
            {"name": "room", "category_id": 7, "score": pytest.approx(0.25), "box": [0, 0, 99, 49.5]},
        ],
    }
    assert found.to_coco(5)[0] == {
        "image_id": 5, "category_id": 3, "bbox": [10, 20, 50, 60], "score": pytest.approx(0.9)
    }  # fmt: skip


def test_detections_as_a_table_of_pandas(found):
    pytest.importorskip("pandas")
    table = found.to_pandas()
    assert list(table.columns) == ["file", "name", "category_id", "score", "x1", "y1", "x2", "y2"]
    assert table["name"].tolist() == ["bath", "room"] and table["x2"].tolist() == [60, 99]
    nothing = found.above(2.0).to_pandas()
    assert list(nothing.columns) == list(table.columns) and len(nothing) == 0
    assert list(nothing.select_dtypes("number").columns) == list(table.select_dtypes("number").columns)
    assert list(table.select_dtypes("number").columns) == ["category_id", "score", "x1", "y1", "x2", "y2"]


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_detections_for_supervision(found):
    supervision = pytest.importorskip("supervision")
    given = found.to_supervision()
    assert isinstance(given, supervision.Detections)
    np.testing.assert_array_equal(given.xyxy, found.boxes_xyxy.numpy())
    assert given.class_id.tolist() == [1, 0] and given["category_id"].tolist() == [3, 7]
    assert given["class_name"].tolist() == ["bath", "room"]
    assert len(given[given.confidence > 0.5]) == 1
    assert len(found.above(2.0).to_supervision()) == 0


@pytest.mark.parametrize("package", ["pandas", "supervision"])
def test_a_package_that_is_not_there_is_named(found, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"python -m pip install {package}"):
        getattr(found, f"to_{package}")()


def test_detections_draw_themselves(found, tmp_path):
    page = np.full((600, 800, 3), 255, dtype=np.uint8)
    Image.fromarray(page).save(tmp_path / "page.png")
    found = found.above(0.5)
    drawn = np.asarray(found.draw(page))
    assert drawn.shape == page.shape and (page == 255).all()
    box = drawn[20:80, 10:60]
    assert (box[0] == box[0, 0]).all() and (box[-1] == box[0, 0]).all() and (box[:, 0] == box[0, 0]).all()
    assert (box[10:-10, 10:-10] == 255).all() and tuple(box[0, 0]) != (255, 255, 255)
    itself = Detections(
        found.boxes_xyxy, found.scores, found.labels, found.class_names,
        read_pixels=partial(read_image, tmp_path / "page.png"),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(itself.draw()), drawn)
    itself.save(tmp_path / "out" / "drawn.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "drawn.png")), drawn)
    itself.save(tmp_path / "out" / "drawn.jpg")
    with pytest.raises(ValueError, match=r"detections\.draw\(image\)"):
        found.draw()
    assert itself.draw(long_side=200).size == (200, 150)


def test_a_small_picture_is_enlarged_and_odd_boxes_are_drawn(found):
    page = torch.full((3, 50, 100), 255, dtype=torch.uint8)
    assert found.draw(page).size == (500, 250)
    assert found.draw(page / 255).size == (500, 250)
    odd = Detections(
        torch.tensor([[-30.0, -9.0, 300.0, 90.0], [99.0, 49.0, 99.0, 49.0], [400.0, 400.0, 500.0, 500.0]]),
        torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([0, 30, 1]),
        tuple(f"Küche\n{label}" for label in range(31)),
    )
    assert odd.draw(Image.new("L", (100, 50))).mode == "RGB"


def test_a_notebook_shows_the_picture_and_a_table(found, tmp_path):
    assert found._repr_png_() is None and "<img" not in found._repr_html_()
    Image.new("RGB", (600, 400), "white").save(tmp_path / "page.png")
    named = replace(found, class_names=("<b>room", "bath"), read_pixels=partial(read_image, tmp_path / "page.png"))
    png = named._repr_png_()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(named.draw()))
    text = named._repr_html_()
    assert f'src="data:image/png;base64,{base64.b64encode(png).decode()}"' in text
    assert "<tr><td>&lt;b&gt;room</td><td>0.250</td><td>0</td><td>0</td><td>99</td><td>50</td></tr>" in text
    assert text.startswith("<p>2 detections in plans/a.png</p>")
    (tmp_path / "page.png").unlink()
    assert named._repr_png_() is None and "<img" not in named._repr_html_()


def test_a_picture_is_shown_where_there_is_a_screen(checkpoint, plan, monkeypatch, capsys, tmp_path):
    detector = load_detector(checkpoint)
    shown = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("PIL.ImageShow.show", lambda page: shown.append(page) or True)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    detector.show(plan)
    (written,) = tmp_path.iterdir()
    assert capsys.readouterr().out == f"There is no screen to show the picture on; it is in {written}.\n"
    expected = np.asarray(detector(plan).draw())
    np.testing.assert_array_equal(np.asarray(Image.open(written)), expected)
    monkeypatch.setenv("DISPLAY", ":0")
    detector(plan).show()
    display = SimpleNamespace(display=shown.append)
    shell = SimpleNamespace(kernel="a kernel")
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    detector(plan).show()
    assert len(shown) == 2 and all((np.asarray(page) == expected).all() for page in shown)
    assert len(list(tmp_path.iterdir())) == 1 and capsys.readouterr().out == ""


@pytest.mark.parametrize("available", [False, True])
def test_a_detector_computes_on_the_gpu_where_there_is_one(checkpoint, monkeypatch, available):
    devices = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setattr(DINOModule, "to", lambda module, device: devices.append(device) or module)
    load_detector(checkpoint)
    load_detector(checkpoint, "cpu")
    assert devices == ["cuda" if available else "cpu", "cpu"]


def test_detections_of_a_detector_draw_themselves(checkpoint, plan):
    detector = load_detector(checkpoint)
    with Image.open(plan) as image:
        page = image.convert("RGB")
    drawn = np.asarray(detector(plan).draw())
    assert (drawn != np.asarray(page.resize((drawn.shape[1], drawn.shape[0]), Image.Resampling.NEAREST))).any()
    np.testing.assert_array_equal(np.asarray(detector(page).draw()), drawn)


def test_chosen_detections_keep_what_they_know(found):
    last = found.chosen(torch.tensor([1]))
    assert last.names == ["room"] and last.file == "plans/a.png"
    (window,) = views((100, 100), None, 0.2, whole=True)
    assert len(seen(window, found.boxes_xyxy, found.labels, found.scores)) == 2
