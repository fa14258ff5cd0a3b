"""The server as a process of its own, from the code in a model directory, under real requests over loopback."""

import base64
import io
import itertools
import json
import random
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version

import psutil
import pytest
from PIL import Image

from dino_lightning import load_detector
from dino_lightning.cli.export import run as export
from dino_lightning.export.package_code import NOT_SERVED, SERVER, serving_requirements
from dino_lightning.floor_plans import write_rooms_dataset
from sagemaker_entry import inference
from sagemaker_entry.serve import main
from tests.sagemaker_entry.served import Server, ask, in_a_thread


@pytest.fixture(scope="module")
def server(model_dir):
    with Server(model_dir, DINO_LIGHTNING_MAX_BYTES="300000", DINO_LIGHTNING_MAX_PIXELS="1000000") as running:
        yield running.ready()


def png(width, height):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def asking(*images, **more):
    return json.dumps({"images": [base64.b64encode(image).decode() for image in images], **more}).encode()


def of_detector(detector, picture, threshold=None):
    """What an answer about an image must hold."""
    (found,) = detector.detect([picture], threshold=threshold)
    return [
        {"name": name, **{key: value for key, value in entry.items() if key != "image_id"}}
        for name, entry in zip(found.names, found.to_coco(0), strict=True)
    ]


def test_answers_equal_those_of_the_detector(server, model_dir, rooms):
    picture = rooms / "val" / "images" / "000001.png"
    detector = load_detector(model_dir, "cpu")
    assert server.ask(path="/ping") == (200, None)
    status, answer = server.ask(picture.read_bytes(), "image/png")
    assert status == 200
    assert answer["predictions"][0]["detections"] == of_detector(detector, picture)
    status, answer = server.ask(asking(picture.read_bytes(), threshold=0.0), "application/json; charset=utf-8")
    assert status == 200
    assert answer["predictions"][0]["detections"] == of_detector(detector, picture, 0.0) != []
    assert server.ask(path="/execution-parameters")[1]["BatchStrategy"] == "SINGLE_RECORD"


BROKEN = {
    "type": ((b"x", "text/plain"), 415, "'text/plain' is not supported"),
    "no-type": ((b"x", None), 415, "'' is not supported"),
    "image": ((b"no image", "image/jpeg"), 400, "is not an image that can be read"),
    "cut": ((png(900, 900)[:-40], "image/png"), 400, "cannot be decoded"),
    "empty": ((b"", "image/png"), 400, "is not an image that can be read"),
    "json": ((b"{", "application/json"), 400, "not valid JSON"),
    "not-utf-8": ((b'{"images": ["\xff"]}', "application/json"), 400, "not valid JSON"),
    "base64": ((b'{"images": ["?"]}', "application/json"), 400, "not a base64-encoded image"),
    "pixels": ((png(1001, 1000), "image/png"), 413, "1,001,000 pixels; the limit"),
    "bytes": ((bytes(300_001), "image/png"), 413, "at least 300,001 bytes; the limit"),
    "huge": ((bytes(20_000_000), "image/png"), 413, "bytes; the limit, DINO_LIGHTNING_MAX_BYTES, is 300,000"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_request_that_cannot_be_answered_gets_one_sentence(server, name):
    (body, kind), expected, words = BROKEN[name]
    try:
        status, answer = server.ask(body, kind)
    except (BrokenPipeError, ConnectionResetError):  # of far more than the limit, the server reads only a part
        assert name == "huge"
    else:
        assert (status, list(answer)) == (expected, ["error"])
        assert words in answer["error"]
    assert server.ask(path="/ping") == (200, None)


@pytest.mark.slow
def test_sigterm_ends_the_server_cleanly(model_dir):
    with Server(model_dir).ready() as server:
        assert server.terminate() == 0
    assert "Traceback" not in server.log


def test_other_addresses_methods_and_accepted_types_are_refused(server, rooms):
    image = (rooms / "val" / "images" / "000001.png").read_bytes()
    assert server.ask(path="/nowhere")[0] == 404
    status, answer = server.ask(path="/invocations")
    assert (status, answer["error"][:18]) == (405, "Method Not Allowed")
    assert server.ask(image, Accept="text/csv")[0] == 406
    assert server.ask(image, Accept="application/json, */*")[0] == 200


def test_chunks_without_a_length_are_counted_as_they_arrive_and_a_broken_connection_harms_nobody(server):
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(40):
            client.sendall(b"2710\r\n" + bytes(10_000) + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        assert client.recv(20).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\nabc"
        )
    server.wait_for("400 in")
    assert server.ask(path="/ping") == (200, None)


class Model:
    """Looks like a detector; `work` is done for each request."""

    def __init__(self, work=lambda: None):
        self.work = work

    def detect(self, images, threshold=None, tta_views=None):
        self.work()
        return []


def answered(port, content=None):
    """What a request of no images gets, or one of an image."""
    return ask(port, asking() if content is None else content, "application/json" if content is None else "image/png")


def test_with_the_queue_full_requests_are_turned_away_and_ping_answers_meanwhile(monkeypatch):
    monkeypatch.setenv("DINO_LIGHTNING_MAX_WAITING", "2")
    inference.limits.cache_clear()
    go = threading.Event()
    with in_a_thread(lambda: Model(lambda: go.wait(60))) as port, ThreadPoolExecutor(8) as clients:
        while ask(port, path="/ping")[0] != 200:
            pass
        answers = [clients.submit(answered, port) for _ in range(8)]
        done = list(itertools.islice(as_completed(answers, timeout=60), 6))
        assert {answer.result()[0] for answer in done} == {503}
        assert "2 requests are waiting already" in done[0].result()[1]["error"]
        assert ask(port, path="/ping") == (200, None)  # while the model computes
        go.set()
        assert sorted(answer.result()[0] for answer in answers) == [200] * 2 + [503] * 6
        assert answered(port) == (200, {"predictions": []})
    inference.limits.cache_clear()


def test_before_the_model_is_loaded_the_container_is_not_healthy():
    go = threading.Event()
    with in_a_thread(lambda: go.wait(60) and Model()) as port:
        assert ask(port, path="/ping") == (503, None)
        assert answered(port) == (503, {"error": "The model is not loaded yet."})
        go.set()


def test_batch_transform_gets_the_sentence_as_the_result_of_a_broken_image():
    with in_a_thread(Model, batch=True) as port:
        while ask(port, path="/ping")[0] != 200:
            pass
        status, answer = answered(port, b"no image")
    assert (status, list(answer)) == (200, ["error"])


def test_an_internal_error_is_told_to_the_log_alone(caplog):
    def fail():
        raise KeyError("a secret place")

    with in_a_thread(lambda: Model(fail)) as port:
        while ask(port, path="/ping")[0] != 200:
            pass
        assert answered(port) == (500, {"error": "Internal error; the log of the container says more."})
        assert ask(port, path="/ping") == (200, None)
    assert "a secret place" in caplog.text


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "model.ckpt").unlink(), "holds no model.ckpt"),
        (lambda folder: (folder / "model.ckpt").write_bytes(b"no model"), "The model cannot be loaded: "),
    ],
    ids=["missing", "damaged"],
)
def test_a_server_without_a_model_ends_with_one_sentence(model_dir, tmp_path, capfd, break_it, words):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.ckpt").write_bytes((model_dir / "model.ckpt").read_bytes())
    break_it(folder)
    assert main(["serve", "--model", str(folder), "--host", "127.0.0.1", "--port", "0"]) == 1
    said = capfd.readouterr()
    assert f"error: {words}" in said.err or (said.err.startswith("error: ") and words in said.err)
    assert "Traceback" not in said.err


def test_the_requirements_are_those_of_the_extra_and_less_than_those_of_training():
    from importlib import metadata

    extra = [line.partition(";")[0].strip() for line in metadata.requires("dino-lightning") if "'serve'" in line]
    needed = serving_requirements()
    names = {line.split(">")[0].split("[")[0].split("!")[0] for line in needed}
    assert set(SERVER) <= set(needed)
    assert not extra or sorted(extra) == sorted(SERVER)
    assert not names & {*NOT_SERVED, "torch", "boto3"}
    assert {"numpy", "pillow", "msgspec"} <= names


def test_the_bash_of_awss_training_images_learns_what_serve_means(model_dir, tmp_path):
    """Their entry point is a bash script that ends in `eval "$@"`; SageMaker gives it the word `serve`."""
    entry = tmp_path / "start.sh"
    entry.write_text('#!/usr/bin/env bash\nbash -c true\nif [[ "$1" = "train" ]]; then exit 9; else eval "$@"; fi\n')
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PYTHONPATH $* [$BASH_ENV]"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "-m", str(entry), "serve"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "BASH_ENV": str(model_dir / "code" / "serve.sh"),
            "DINO_LIGHTNING_CODE": str(model_dir / "code"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{model_dir / 'code'} -m sagemaker_entry.serve --install []\n"


def test_the_code_of_a_model_installs_its_packages_in_the_tested_versions(model_dir, tmp_path):
    """As at the start of an endpoint, with the files of the model alone; an installer that shows what it is given."""
    shows = 'for word in "$@"; do case "$word" in *.txt) cat "$word";; esac; done'
    (tmp_path / "uv").write_text(f"#!/bin/sh\n{shows}\nexit 3\n")
    (tmp_path / "uv").chmod(0o755)
    command = [sys.executable, "-m", "sagemaker_entry.serve", "serve", "--install", "--model", str(tmp_path)]
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(model_dir / "code")}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "uv could not install the requirements" in done.stderr
    given = done.stdout.splitlines()
    assert {"starlette>=0.41", "uvicorn==0.54.0", f"torch=={version('torch')}"} <= set(given)


# ------------------------------------------------------------------ many requests at once


def hammer(server, detector, pictures, requests, broken, at_once=8):
    """(wrong answers, statuses) of so many requests, of which some are broken, several at a time."""
    expected = {picture: of_detector(detector, picture) for picture in pictures}
    order = random.Random(0)
    jobs = [None] * broken + [order.choice(pictures) for _ in range(requests - broken)]
    order.shuffle(jobs)
    kinds = [BROKEN[name] for name in ("type", "image", "json", "base64", "empty")]

    def one(job):
        index, picture = job
        if picture is None:
            (body, kind), status, words = kinds[index % len(kinds)]
            got, answer = server.ask(body, kind)
            return got, got == status and words in answer["error"]
        content = picture.read_bytes()
        body, kind = (content, "image/png") if index % 2 else (asking(content), "application/json")
        got, answer = server.ask(body, kind)
        return got, got == 200 and answer["predictions"][0]["detections"] == expected[picture]

    with ThreadPoolExecutor(at_once) as clients:
        results = list(clients.map(one, enumerate(jobs)))
    return sum(not right for _, right in results), [status for status, _ in results]


def memory(server):
    return psutil.Process(server.process.pid).memory_info().rss / 2**20


def test_some_requests_at_once_with_broken_ones_among_them(server, model_dir, rooms):
    pictures = sorted((rooms / "val" / "images").glob("*.png"))
    wrong, statuses = hammer(server, load_detector(model_dir, "cpu"), pictures, 24, 6, at_once=4)
    assert wrong == 0
    assert statuses.count(200) == 18
    assert server.process.poll() is None


@pytest.mark.slow
def test_two_hundred_requests_eight_at_once_with_twenty_broken_ones(tmp_path):
    """With the weights that the package brings, on plans of several sizes: nothing wrong, memory flat."""
    model = tmp_path / "model"
    assert export(["--ckpt_path", "rooms_small", "--output", str(model), "--format", "directory"]) == 0
    plans = [
        picture
        for size in (300, 420)
        for picture in sorted(
            (write_rooms_dataset(tmp_path / f"{size}", num_train=1, num_val=5, size=size) / "val" / "images").glob("*")
        )
    ]
    detector = load_detector(model, "cpu")
    with Server(model).ready() as server:
        wrong, _ = hammer(server, detector, plans, 40, 4)  # until all sizes were seen
        assert wrong == 0
        before = memory(server)
        wrong, statuses = hammer(server, detector, plans, 200, 20)
        after = memory(server)
        print(f"200 requests, {statuses.count(200)} answered, {wrong} wrong; {before:.0f} MB before, {after:.0f} after")
        assert (wrong, statuses.count(200), server.process.poll()) == (0, 180, None)
        assert after - before < 100
        assert server.terminate() == 0
    assert "Traceback" not in server.log
