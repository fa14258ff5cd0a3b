"""The model directory served by the real handler stack of sagemaker-inference, away from the checkout."""

import base64
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dino_lightning import DINOModule, load_detector
from sagemaker_entry.container.install import constraints, install
from sagemaker_entry.laptop.source_archive import build_archive, requirements
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.train import write_model
from tests.conftest import TINY_SIZES, size_of

# What the model server does with a request, without its Java front end.
SERVER = textwrap.dedent(
    """
    import base64, json, sys
    from types import SimpleNamespace
    from sagemaker_inference.default_handler_service import DefaultHandlerService

    model_dir = sys.argv[1]
    answers = []
    for request in json.load(sys.stdin):
        status = []
        headers = {"Content-Type": request["type"], "Accept": request.get("accept", "application/json")}
        context = SimpleNamespace(
            system_properties={"model_dir": model_dir},
            request_processor=[SimpleNamespace(get_request_properties=lambda: headers)],
            set_response_content_type=lambda index, kind: status.append(kind),
            set_response_status=lambda code, phrase: status.append(code),
        )
        service = DefaultHandlerService()
        service.initialize(context)
        (answer,) = service.handle([{"body": base64.b64decode(request["body"])}], context)
        answers.append([status[-1], answer])
    import dino_lightning
    print(json.dumps({"answers": answers, "package": dino_lightning.__file__}))
    """
)


@pytest.fixture(scope="module")
def model_dir(rooms, tmp_path_factory):
    """A model directory as a job leaves it."""
    import lightning
    import torch

    from dino_lightning import CocoDataModule

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0)
    module = DINOModule(num_classes=1, backbone_weights=None, **TINY_SIZES)
    trainer = lightning.Trainer(
        max_epochs=1,
        limit_train_batches=1,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "checkpoints" / "best.ckpt")
    assert write_model(folder, folder / "model", complete=True)
    return folder / "model"


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
    one, two = json.loads(answers[0][1])["predictions"], json.loads(answers[1][1])["predictions"]
    assert [answers[0][0], answers[1][0]] == ["application/json"] * 2
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
    for (status, message), words in zip(
        answers[2:],
        (
            "'text/plain' is not supported",
            "cannot be decoded",
            "not a base64-encoded image",
            "must look like",
            "not 'text/csv'",
        ),
        strict=True,
    ):
        assert status == 500
        assert words in message


# ------------------------------------------------------------------ the code that goes along


def test_the_code_is_packed_the_same_way_each_time_and_brings_what_it_needs():
    assert build_archive() == build_archive()
    needed = requirements()
    names = {line.split(">")[0].split("[")[0].split("!")[0] for line in needed}
    assert {"lightning", "torchmetrics", "pycocotools", "jsonargparse"} <= names
    assert not names & {"torch", "torchvision", "sagemaker", "boto3", "pytest", "moto"}


def test_installing_never_replaces_the_images_torch(tmp_path):
    import torch
    import torchvision

    plain = [package.__version__.partition("+")[0] for package in (torch, torchvision)]
    assert [line.partition("+")[0] for line in constraints()] == [f"torch=={plain[0]}", f"torchvision=={plain[1]}"]
    commands = []

    def run(command):
        commands.append((command, Path(command[-1]).read_text()))  # gone after the call
        return subprocess.CompletedProcess(command, 0, "")

    install(tmp_path, run)
    assert not commands  # nothing asked for, nothing done
    (tmp_path / "requirements.txt").write_text("lightning\n")
    install(tmp_path, run)
    ((command, pinned),) = commands
    assert command[-4:-1] == ["-r", str(tmp_path / "requirements.txt"), "-c"]
    assert f"torch=={plain[0]}" in pinned
    with pytest.raises(Problem, match=r"ERROR: no such thing.*network isolation"):
        install(tmp_path, lambda command: subprocess.CompletedProcess(command, 1, "x\nERROR: no such thing\n"))
