"""Models on the Hugging Face Hub: the client's own protocol, spoken by a server on loopback."""

import base64
import hashlib
import json
import re
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from dino_lightning import load_detector
from dino_lightning.__main__ import run
from dino_lightning.errors import CheckpointError
from dino_lightning.export.hub import card
from dino_lightning.model import DINO
from dino_lightning.weights.download import local_file
from dino_lightning.weights.published_layout import to_published
from tests.conftest import TINY_ARGS

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """As much of the hub as making a repository, one commit of files and their download need."""

    def __init__(self):
        self.files, self.private, self.asked, self.denied = {}, {}, [], None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.post(self, self.rfile.read(int(self.headers["Content-Length"])))

            def do_HEAD(self):
                outer.get(self, body=False)

            def do_GET(self):
                outer.get(self, body=True)

            def log_message(self, *args):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=partial(self.httpd.serve_forever, poll_interval=0.01), daemon=True).start()

    def answer(self, handler, status, content, headers=None, body=True):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        if body:
            handler.wfile.write(data)

    def post(self, handler, data):
        path = handler.path.partition("?")[0]
        self.asked.append((path, handler.headers.get("Authorization")))
        if self.denied:
            return self.answer(handler, self.denied, {"error": "denied"})
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            known, self.private[name] = name in self.private, self.private.get(name, wanted)
            content = {"url": f"{self.address}/{name}", "id": name}
            return self.answer(handler, 409 if known else 200, content)
        if "/preupload/" in path:
            wanted = json.loads(data)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wanted]
            return self.answer(handler, 200, {"files": modes})
        if "/commit/" in path:
            name = re.match(r"/api/models/([^/]+/[^/]+)/", path)[1]
            for line in data.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[f"/{name}/resolve/main/{entry['value']['path']}"] = content
            done = {"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            return self.answer(handler, 200, done)
        if path == "/api/validate-yaml":
            return self.answer(handler, 200, {"errors": [], "warnings": []})
        return self.answer(handler, 404, {"error": path})

    def get(self, handler, body):
        path = handler.path.partition("?")[0]
        self.asked.append((path, handler.headers.get("Authorization")))
        if path in self.files:
            content = self.files[path]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.answer(handler, 200, content, headers, body)
        if (known := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", path)) and known[1] in self.private:
            return self.answer(handler, 200, {"id": known[1], "sha": COMMIT, "siblings": []}, body=body)
        code = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
        return self.answer(handler, 404, {"error": code}, {"X-Error-Code": code}, body)


@pytest.fixture
def server(monkeypatch, tmp_path):
    served = Hub()
    monkeypatch.setenv("HF_ENDPOINT", served.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield served
    served.httpd.shutdown()
    served.httpd.server_close()


@pytest.fixture(scope="module")
def trained(rooms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert run(["fit", "--data.root", str(rooms), "--run_dir", str(folder), "--trainer.max_epochs=1", *TINY_ARGS]) == 0
    return folder


def test_a_model_is_pushed_and_pulled(server, trained, rooms, capsys):
    pushed = ["convert", "--weights", str(trained), "--output", "hf://me/rooms"]
    assert run(pushed) == 0
    output = capsys.readouterr().out
    assert f"{server.address}/me/rooms: a model directory with a card" in output
    made = server.private["me/rooms"]
    assert made.get("private") is True or made.get("visibility") == "private"
    assert all(token == "Bearer hf_secret" for _, token in server.asked)
    names = {path.removeprefix("/me/rooms/resolve/main/") for path in server.files}
    assert {"README.md", "model.ckpt", "model.json", "code/inference.py", "code/requirements.txt"} <= names
    assert "config.yaml" not in names  # it has paths of the user's machine
    text = server.files["/me/rooms/resolve/main/README.md"].decode()
    assert 'load_detector("hf://me/rooms")' in text
    assert "objects of one class, room" in text
    assert re.search(r"\| AP \| AP50 \|.*\n.*\n\| 0\.\d{3} \| 0\.\d{3} \|", text)

    image = next((rooms / "val").rglob("*.png"), None) or next(rooms.rglob("*.png"))
    pulled, here = load_detector("hf://me/rooms"), load_detector(str(trained))
    first, second = (detector([str(image)], threshold=0.0)[0] for detector in (pulled, here))
    assert len(first.scores)
    torch.testing.assert_close(first.boxes_xyxy, second.boxes_xyxy)

    assert run(pushed) == 1
    assert "hf://me/rooms has a model already; give --overwrite to replace it." in capsys.readouterr().err
    assert run([*pushed, "--overwrite"]) == 0


def test_weights_of_another_layout_are_pushed_in_ours(server, tmp_path, capsys):
    sizes = {"hidden_dim": 32, "ffn_dim": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_queries": 5}
    model = DINO(num_classes=2, backbone="resnet18", **sizes)
    torch.save({"model": to_published(model.state_dict())}, tmp_path / "official.pth")
    assert run(["convert", "--weights", str(tmp_path / "official.pth"), "--output", "hf://me/other"]) == 0
    assert "None are known" in server.files["/me/other/resolve/main/README.md"].decode()
    (tmp_path / "pulled.ckpt").write_bytes(server.files["/me/other/resolve/main/model.ckpt"])
    state = torch.load(tmp_path / "pulled.ckpt", weights_only=True)["state_dict"]
    for key, value in model.state_dict().items():
        assert torch.equal(state[f"model.{key}"], value), key


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--output", "hf://rooms"], "give hf://OWNER/REPO"),
        (["--output", "hf://me/rooms/file"], "give hf://OWNER/REPO"),
        (["--output", "hf://me/rooms", "--layout", "detrex"], "has our layout"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_asked(server, trained, capsys, more, sentence):
    assert run(["convert", "--weights", str(trained), *more]) in (1, 2)
    assert sentence in capsys.readouterr().err
    assert not server.asked


def test_without_the_client_the_sentence_says_what_to_install(trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert run(["convert", "--weights", str(trained), "--output", "hf://me/rooms"]) == 1
    assert "needs the package huggingface_hub: pip install 'dino-lightning[hub]'" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_said_to_be_none(server, trained, capsys, status):
    server.denied = status
    assert run(["convert", "--weights", str(trained), "--output", "hf://me/rooms"]) == 1
    error = capsys.readouterr().err
    assert "hf://me/rooms cannot be written (" in error
    assert "Log in with `hf auth login`" in error
    assert "hf_secret" not in error


def test_offline_the_clients_cache_is_used(server, monkeypatch):
    server.files["/me/rooms/resolve/main/model.ckpt"] = b"content"
    assert local_file("hf://me/rooms").read_bytes() == b"content"
    sha256 = hashlib.sha256(b"content").hexdigest()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(server.asked)
    assert local_file(f"hf://me/rooms#sha256={sha256}").read_bytes() == b"content"
    with pytest.raises(CheckpointError, match="is not the expected file: its sha256 is"):
        local_file("hf://me/rooms#sha256=00000000")
    with pytest.raises(CheckpointError, match=r"hf://me/else/model\.ckpt is not in the cache of huggingface_hub"):
        local_file("hf://me/else")
    assert len(server.asked) == before


def test_what_the_hub_does_not_have_is_said_by_the_plain_download(server):
    with pytest.raises(
        CheckpointError, match=r"/me/none/resolve/main/model\.ckpt cannot be downloaded: the server says 404"
    ):
        local_file("hf://me/none")


def test_a_card_of_many_classes_has_a_table_and_no_marks_of_its_names(tmp_path):
    classes = [
        {"label": 0, "category_id": 3, "name": "door|window"},
        {"label": 1, "category_id": 7, "name": "<b>wall</b>"},
    ]
    preprocessing = {"short_side": 800, "long_side_at_most": 1333, "stretched_to_a_square_of": None}
    told = {"classes": classes, "preprocessing": preprocessing, "metrics": {}, "epoch": 1, "score_threshold": 0.3}
    text = card(told, "me/rooms", tmp_path)
    assert "| 0 | 3 | door\\|window |" in text
    assert "<b>" not in text.replace("\\<b\\>", "")
    assert "None are known" in text
    assert "short side of 800 pixels and at most 1333" in text
