"""The model directory served by the real handler stack of sagemaker-inference, away from the checkout."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from PIL import Image

from dino_lightning import load_detector
from sagemaker_entry import inference
from sagemaker_entry.laptop.source_archive import build_archive, requirements
from tests.conftest import size_of

# What the model server does with a request, without its Java front end.
SERVER = textwrap.dedent(
    """
    import base64, json, sys
    from types import SimpleNamespace
    from sagemaker_inference.default_handler_service import DefaultHandlerService

    model_dir = sys.argv[1]
    answers = []
    for request in json.load(sys.stdin):
        status, kinds = [200], []
        headers = {"Content-Type": request["type"], "Accept": request.get("accept", "application/json")}
        context = SimpleNamespace(
            system_properties={"model_dir": model_dir},
            request_processor=[SimpleNamespace(get_request_properties=lambda: headers)],
            set_response_content_type=lambda index, kind: kinds.append(kind),
            set_response_status=lambda code, phrase: status.append(code),
        )
        service = DefaultHandlerService()
        service.initialize(context)
        (answer,) = service.handle([{"body": base64.b64decode(request["body"])}], context)
        answers.append([status[-1], kinds[-1], answer])
    import dino_lightning
    print(json.dumps({"answers": answers, "package": dino_lightning.__file__}))
    """
)


def serve(model_dir, tmp_path, requests):
    script = tmp_path / "serve.py"
    script.write_text(SERVER)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), str(model_dir)],
        input=json.dumps(requests),
        env={**kept, "PYTHONPATH": str(model_dir / "code"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_served_detections_equal_those_of_the_model(model_dir, rooms, tmp_path):
    pytest.importorskip("sagemaker_inference")
    picture = rooms / "val" / "images" / "000001.png"
    image = base64.b64encode(picture.read_bytes()).decode()
    asked = json.dumps({"images": [image, image], "threshold": 0.0})
    served = serve(
        model_dir,
        tmp_path,
        [
            {"type": "image/png", "body": image},
            {"type": "application/json", "body": base64.b64encode(asked.encode()).decode()},
            {"type": "text/plain", "body": image},
            {"type": "image/jpeg", "body": base64.b64encode(b"no image").decode()},
            {"type": "application/json", "body": base64.b64encode(b'{"images": ["?"]}').decode()},
            {"type": "application/json", "body": base64.b64encode(b"[1]").decode()},
            {"type": "image/png", "body": image, "accept": "text/csv"},
        ],
    )
    assert str(model_dir) in served["package"]  # the code that was shipped, not this checkout
    detector = load_detector(model_dir / "model.ckpt")
    (everything,) = detector.detect([picture], threshold=0.0)
    (above,) = detector.detect([picture])
    answers = served["answers"]
    assert {kind for _, kind, _ in answers} == {"application/json"}
    one, two = (json.loads(answer)["predictions"] for _, _, answer in answers[:2])
    assert [status for status, *_ in answers[:2]] == [200, 200]
    assert (len(one), len(two)) == (1, 2)
    assert len(one[0]["detections"]) == len(above)
    assert len(two[0]["detections"]) == len(everything) > 0
    assert two[0] == two[1]
    for entry, expected in zip(two[0]["detections"], everything.to_coco(0), strict=True):
        assert entry["name"] == "room"
        assert entry["category_id"] == 1
        assert entry["score"] == pytest.approx(expected["score"], abs=1e-5)
        assert entry["bbox"] == pytest.approx(expected["bbox"], abs=1e-2)

    assert (two[0]["width"], two[0]["height"]) == size_of(picture)
    for (status, _, answer), (expected, words) in zip(
        answers[2:],
        (
            (415, "'text/plain' is not supported"),
            (400, "is not an image that can be read"),
            (400, "not a base64-encoded image"),
            (400, "must look like"),
            (406, "not 'text/csv'"),
        ),
        strict=True,
    ):
        assert status == expected
        assert list(json.loads(answer)) == ["error"]
        assert words in answer
        assert "Traceback" not in answer


# ------------------------------------------------------------------ what a request may ask for


@pytest.fixture
def handler(monkeypatch):
    """The handler with limits of its own, as a new container reads them."""

    def started(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"DINO_LIGHTNING_{name}", value)
        inference.limits.cache_clear()
        return inference

    yield started
    inference.limits.cache_clear()


def png(width, height, mode="1"):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def asking(*images, **more):
    return json.dumps({"images": [base64.b64encode(image).decode() for image in images], **more})


def test_an_image_of_144_megapixels_is_refused_by_its_header(handler, monkeypatch):
    huge = png(12_000, 12_000)
    assert len(huge) < 140_000
    monkeypatch.setattr(inference, "decode_image", None)  # no pixel of it is decoded
    with pytest.raises(inference.RequestError, match=r"144,000,000 pixels.*MAX_PIXELS, is 64,000,000\.$") as refused:
        handler().parse_request(huge, "image/png")
    assert refused.value.status == 413


@pytest.mark.parametrize(
    ("body", "variables", "status", "words"),
    [
        pytest.param(asking(*[png(4, 4)] * 17), {}, 413, "17 images; .*MAX_IMAGES, is 16", id="images"),
        pytest.param(asking(*[png(4, 4)] * 3), {"MAX_IMAGES": "2"}, 413, "3 images; .*, is 2", id="images-option"),
        pytest.param(asking(png(8, 9)), {"MAX_BYTES": "50"}, 413, "bytes; .*MAX_BYTES, is 50", id="bytes"),
        pytest.param(
            asking(png(8, 9), png(9, 8)), {"MAX_PIXELS": "143"}, 413, "Image 0 to image 1 have 144 pixels", id="pixels"
        ),
        pytest.param("[" * 200_000, {}, 413, "nested 9 deep or more; .*MAX_JSON_DEPTH, is 8", id="depth"),
        pytest.param("[" * 200_000, {"MAX_JSON_DEPTH": "900000"}, 400, "not valid JSON", id="depth-option"),
        pytest.param(asking(threshold=float("nan")), {}, 400, "NaN is not a number of JSON", id="nan"),
        pytest.param(asking(threshold=-5), {}, 400, "threshold is -5; it must be a number from 0 to 1", id="negative"),
        pytest.param(asking(threshold=True), {}, 400, "threshold is True; it must", id="true"),
        pytest.param(asking(threshold="0.5"), {}, 400, "threshold is '0.5'; it must", id="text"),
        pytest.param('{"images": [], "threshold": 1e999}', {}, 400, "threshold is inf; it must", id="infinite"),
        pytest.param(asking(thresold=0.5), {}, 400, "no key 'thresold'.*images, threshold and tta_views", id="key"),
        pytest.param(asking(png(8, 8), tta_views=3), {}, 400, "tta_views is 3; it must be 1, 2, 4 or 8", id="views"),
        pytest.param(asking(tta_views=True), {}, 400, "tta_views is True; it must", id="views-true"),
        pytest.param('{"images": [[5]]}', {}, 400, "Image 0 is not a base64-encoded image", id="list"),
        pytest.param(b'{"images": ["\xff"]}', {}, 400, "not valid JSON", id="not-utf-8"),
        pytest.param(asking(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), {}, 400, "type EPS; send", id="eps"),
        pytest.param(asking(png(99, 99, "RGB")[:-30]), {}, 400, "Image 0 cannot be decoded", id="cut"),
        pytest.param(asking(png(40_000, 40_000)[:200]), {}, 400, "40000 x 40000 pixels, more", id="gigapixels"),
    ],
)
def test_requests_that_ask_too_much_or_make_no_sense(handler, body, variables, status, words):
    error = handler(**variables).input_fn(body, "application/json")
    assert isinstance(error, inference.RequestError), error
    assert error.status == status
    assert re.search(words, str(error)), error
    assert len(str(error)) < 250

    said = []
    context = SimpleNamespace(set_response_status=lambda code, phrase: said.append(code))
    answer, kind = inference.output_fn(inference.predict_fn(error, None), "text/csv", context)
    assert (said, kind, json.loads(answer)) == ([status], "application/json", {"error": str(error)})
    toolkit = pytest.importorskip("sagemaker_inference.errors")
    with pytest.raises(toolkit.GenericInferenceToolkitError) as raised:  # a server without context
        inference.output_fn(error, "application/json")
    assert (raised.value.status_code, raised.value.message) == (status, answer)


def test_brackets_and_quotes_in_strings_are_no_depth(handler):
    text = "[" * 50 + '"' + "\\" + "{" * 50
    with pytest.raises(inference.RequestError, match="Image 0 is not a base64"):
        handler().parse_request(json.dumps({"images": [text]}), "application/json")


@pytest.mark.parametrize("value", ["", "0", "-1", "many", "1e6", "nan"])
def test_a_limit_that_is_no_number_keeps_the_endpoint_from_starting(handler, value):
    with pytest.raises(ValueError, match=r"variable DINO_LIGHTNING_MAX_BYTES is .*whole number from 1 on\.$"):
        handler(MAX_BYTES=value).model_fn("anywhere")


@pytest.mark.parametrize(("gpu", "exported", "expected"), [(0, 1, "onnx"), (1, 1, "ckpt"), (0, 0, "ckpt")])
def test_an_onnx_file_beside_the_checkpoint_is_used_without_a_gpu(monkeypatch, tmp_path, gpu, exported, expected):
    pytest.importorskip("onnxruntime")
    loaded = []
    monkeypatch.setattr(inference, "load_detector", lambda path, *_: loaded.append(path.suffix))
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(gpu))
    for name in ("model.ckpt", *["model.onnx"] * exported):
        (tmp_path / name).touch()
    inference.model_fn(str(tmp_path))
    assert loaded == [f".{expected}"]


# ------------------------------------------------------------------ the code that goes along


def test_the_code_is_packed_the_same_way_each_time_and_brings_what_it_needs():
    assert build_archive() == build_archive()
    needed = requirements()
    names = {line.split(">")[0].split("[")[0].split("!")[0] for line in needed}
    assert {"lightning", "torchmetrics", "pycocotools", "jsonargparse"} <= names
    assert not names & {"torch", "torchvision", "sagemaker", "boto3", "pytest", "moto"}
