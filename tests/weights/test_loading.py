"""Weights from addresses: servers that break off, skip, forget and change; checksums; the cache; S3."""

import datetime
import hashlib
import ipaddress
import os
import re
import ssl
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from dino_lightning.__main__ import run
from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.weights import download, transfer
from dino_lightning.weights.download import cache_folder, local_file
from dino_lightning.weights.loading import load_initial_weights
from dino_lightning.weights.transfer import _KeepsEncryption
from tests.conftest import TINY_ARGS, TINY_SIZES


class Server:
    """Serves `content`; what it does wrong is set by attributes."""

    def __init__(self):
        self.content = b""
        self.etag = '"1"'
        self.ranges = True  # understands Range and If-Range
        self.break_after = []  # for each answer still to come, after how many bytes the line goes dead
        self.status = []  # for each answer still to come, a status instead of the file
        self.asked = []  # the Range header of each request
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.httpd.server_port}/some/weights.pth"
        threading.Thread(target=partial(self.httpd.serve_forever, poll_interval=0.01), daemon=True).start()

    def answer(self, handler):
        asked = handler.headers.get("Range")
        self.asked.append(asked)
        if self.status:
            handler.send_error(self.status.pop(0))
            return
        start = 0
        if asked and self.ranges and handler.headers.get("If-Range") == self.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(self.content):
                handler.send_error(416)
                return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body)))
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.end_headers()
        handler.wfile.write(body[: self.break_after.pop(0)] if self.break_after else body)
        handler.close_connection = True


@pytest.fixture
def server():
    server = Server()
    server.content = os.urandom(300_000)
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "_PAUSE", 0.0)
    return tmp_path / "cache" / "dino_lightning" / "weights"


def files(cache):
    return sorted(path.suffix for path in cache.iterdir() if path.suffix != ".lock")


def test_a_file_is_downloaded_once(server, cache, capfd):
    path = local_file(server.address)
    assert path.parent == cache == cache_folder()
    assert path.read_bytes() == server.content
    assert "weights.pth: 100%" in capfd.readouterr().err  # the progress bar
    assert local_file(server.address) == path
    assert server.asked == [None]
    assert files(cache) == [".pth"]


def test_two_places_with_one_name_are_two_files(server):
    first = local_file(server.address)
    old, server.content = server.content, b"other"
    second = local_file(server.address.replace("some", "other"))
    assert (first.read_bytes(), second.read_bytes()) == (old, b"other")


def test_a_dropped_connection_goes_on_where_it_was(server):
    server.break_after = [100_000, 50_000]
    assert local_file(server.address).read_bytes() == server.content
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_an_https_server_is_trusted_by_its_certificate_alone(server, tmp_path, monkeypatch):
    """As of a mirror within a company, whose certificate SSL_CERT_FILE names."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, private = tmp_path / "certificate.pem", tmp_path / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    forms = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(*forms))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem, private)
    server.httpd.socket = context.wrap_socket(server.httpd.socket, server_side=True)
    address = server.address.replace("http://", "https://")
    with pytest.raises(CheckpointError, match=r"failed 5 times \(last: .*certificate"):
        local_file(address)
    assert not server.asked
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    server.break_after = [100_000]
    checksum = hashlib.sha256(server.content).hexdigest()
    assert local_file(f"{address}#sha256={checksum}").read_bytes() == server.content
    assert server.asked == [None, "bytes=100000-"]


def test_the_next_start_goes_on_where_the_last_one_ended(server, cache):
    server.break_after = [10_000] * 5
    with pytest.raises(CheckpointError, match=r"failed 5 times .*; 50,000 bytes are kept, and the next run resumes"):
        local_file(server.address)
    assert ".pth" not in files(cache)
    assert local_file(server.address).read_bytes() == server.content
    assert server.asked[-1] == "bytes=50000-"


@pytest.mark.parametrize("ranges", [True, False], ids=["it has another version", "it cannot skip"])
def test_a_server_that_sends_all_again_is_understood(server, ranges):
    """The file was replaced in between, or the server knows no ranges: nothing of the first half may stay."""
    server.ranges = ranges
    server.break_after = [20_000] * 5
    with pytest.raises(CheckpointError, match="failed 5 times"):
        local_file(server.address)
    if ranges:
        server.content, server.etag = os.urandom(200_000), '"2"'
    assert local_file(server.address).read_bytes() == server.content


def test_without_a_version_nothing_is_pieced_together(server):
    server.etag = ""
    server.break_after = [100_000]
    assert local_file(server.address).read_bytes() == server.content
    assert server.asked == [None, None]


def test_a_rest_longer_than_the_file_is_thrown_away(server, cache):
    local_file(server.address)
    path = next(cache.glob("*.pth"))
    path.rename(f"{path}.part").write_bytes(b"x" * 400_000)
    Path(f"{path}.part.version").write_text(server.etag)
    assert local_file(server.address).read_bytes() == server.content
    assert files(cache) == [".pth"]


def test_a_busy_server_is_asked_again(server):
    server.status = [503, 429, 500]
    assert local_file(server.address).read_bytes() == server.content


def test_checksums(server, cache):
    right = hashlib.sha256(server.content).hexdigest()
    path = local_file(f"{server.address}#sha256={right.upper()}")
    assert path.read_bytes() == server.content
    path.write_bytes(b"damaged later")
    assert local_file(f"{server.address}#sha256={right}").read_bytes() == server.content
    with pytest.raises(CheckpointError, match=f"its sha256 is {right}, not {'0' * 64}"):
        local_file(f"{server.address}#sha256={'0' * 64}")
    assert files(cache) == []
    with pytest.raises(CheckpointError, match="64 hexadecimal digits"):
        local_file(f"{server.address}#sha256=12")
    with pytest.raises(CheckpointError, match="64 hexadecimal digits"):
        local_file(f"{server.address}#md5={'0' * 32}")


def test_an_absent_file_is_refused_at_once(server, cache):
    server.status = [404]
    with pytest.raises(CheckpointError, match=r"weights.pth cannot be downloaded: the server says 404 Not Found\."):
        local_file(server.address)
    assert len(server.asked) == 1
    assert files(cache) == []


def test_a_file_that_vanishes_halfway_is_refused(server):
    server.break_after = [1000]
    original = server.answer

    def answer(handler):
        if server.asked:
            server.status = [404]
        original(handler)

    server.answer = answer
    with pytest.raises(CheckpointError, match="404"):
        local_file(server.address)


def test_unencrypted_weights_need_a_checksum(server, monkeypatch):
    """Unless the server is this machine, as in these tests."""
    for address in ("http://nowhere.invalid/w.pth", "http://10.0.0.1/w.pth"):
        with pytest.raises(CheckpointError, match=r"is not encrypted, .* append #sha256= and"):
            local_file(address)
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="is not encrypted"):
        local_file("hf://me/rooms/w.pth")
    assert local_file(server.address.replace("127.0.0.1", "localhost")).read_bytes() == server.content
    monkeypatch.setattr(download, "is_unencrypted", lambda address: True)
    with pytest.raises(CheckpointError, match="is not encrypted"):
        local_file(server.address)
    checksum = hashlib.sha256(server.content).hexdigest()
    assert local_file(f"{server.address}#sha256={checksum}").read_bytes() == server.content


def test_a_redirection_may_not_drop_the_encryption():
    request = urllib.request.Request("https://host/w.pth?signature")
    with pytest.raises(CheckpointError, match=r"redirects to .* http://other/w.pth\?\*{3}\.$"):
        _KeepsEncryption().redirect_request(request, None, 302, "", {}, "http://other/w.pth?signature")
    assert _KeepsEncryption().redirect_request(request, None, 302, "", {}, "https://other/w.pth") is not None


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/weights.pth", "https://nowhere.invalid/weights.pth"])
def test_no_server_at_all(address):
    with pytest.raises(CheckpointError, match=r"failed 5 times \(last: .*\); nothing was received\.$"):
        local_file(address)


def test_what_is_no_place(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"^none.pth does not exist: it is neither a file nor an address .* nor the name"
    ):
        local_file("none.pth")
    (tmp_path / "here.pth").touch()
    assert local_file(str(tmp_path / "here.pth")) == tmp_path / "here.pth"


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME"):
        local_file(server.address)


def test_several_at_once_download_once(server):
    """As the processes of one machine do; the lock is one of the file system's, so it works between processes too."""
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(local_file, [server.address] * 4))
    assert len(paths) == len(server.asked) == 1
    assert paths.pop().read_bytes() == server.content


def test_signatures_and_passwords_in_addresses_stay_out_of_messages(server):
    address = server.address.replace("http://", "http://me:secret@") + "?X-Amz-Signature=secret"
    server.status = [403, 403]
    with pytest.raises(CheckpointError, match=r"http://127.0.0.1:\d+/some/weights.pth\?\*{3} cannot .* 403") as caught:
        local_file(address.replace("me:secret@", ""))
    assert "secret" not in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        local_file(address)
    assert "secret" not in str(caught.value)


def test_a_model_starts_from_an_address(server, tmp_path):
    source = DINO(num_classes=2, **TINY_SIZES)
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in source.state_dict().items()}}, tmp_path / "a.ckpt"
    )
    server.content = (tmp_path / "a.ckpt").read_bytes()
    model = DINO(num_classes=2, **TINY_SIZES)
    report = load_initial_weights(model, server.address)
    assert "dino_lightning checkpoint" in str(report)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------ the command line


def fit(rooms, tmp_path, *args):
    options = ["--data.root", str(rooms), "--trainer.fast_dev_run=true", f"--run_dir={tmp_path / 'run'}"]
    return run(["fit", *options, *TINY_ARGS, *args])


def test_fit_refuses_a_wrong_address_in_one_sentence(rooms, tmp_path, server, capsys):
    server.status = [404]
    assert fit(rooms, tmp_path, f"--model.weights={server.address}") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "404" in error[0]


def test_from_scratch_on_few_images_is_warned_of(rooms, tmp_path, recwarn, caplog):
    assert fit(rooms, tmp_path) == 0
    said = [str(warning.message) for warning in recwarn if "from scratch" in str(warning.message)]
    assert len(said) == 1
    assert "8 images" in said[0]
    assert "--model.weights" in said[0]


def test_a_backbone_alone_gets_a_hint_and_weights_get_a_table(rooms, tmp_path, recwarn, caplog):
    source = DINO(num_classes=1, **TINY_SIZES)
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pth")
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    with caplog.at_level("INFO"):
        assert fit(rooms, tmp_path, f"--model.backbone_weights={tmp_path / 'backbone.pth'}") == 0
        assert "8 images are few" in caplog.text
        assert "backbone.pth, a backbone of dino_lightning: " in caplog.text
        caplog.clear()
        assert fit(rooms, tmp_path, f"--model.weights={tmp_path / 'whole.pth'}") == 0
        assert re.search(r"loaded +re-mapped +new +ignored", caplog.text)
        assert "images are few" not in caplog.text
    assert not [warning for warning in recwarn if "from scratch" in str(warning.message)]


# ------------------------------------------------------------------ S3


def test_a_file_of_the_hugging_face_hub(server, monkeypatch):
    """The token goes to the hub and not to where it sends the program for the file."""
    hub = server.address.removesuffix("/some/weights.pth")
    asked = []

    def answer(handler):
        asked.append((handler.path, handler.headers.get("Authorization")))
        if handler.path.startswith("/storage"):
            return Server.answer(server, handler)
        handler.send_response(302)
        handler.send_header("Location", f"http://localhost:{server.httpd.server_port}/storage/file")
        handler.end_headers()

    monkeypatch.setattr(server, "answer", answer)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed: plain HTTPS
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert local_file("hf://me/rooms/weights/last.pth").read_bytes() == server.content
    assert asked == [("/me/rooms/resolve/main/weights/last.pth", "Bearer secret"), ("/storage/file", None)]
    assert local_file("hf://me/rooms").name.endswith("-model.ckpt")
    assert asked[2][0] == "/me/rooms/resolve/main/model.ckpt"
    with pytest.raises(CheckpointError, match="hf://OWNER/REPO/FILE"):
        local_file("hf://rooms")


@pytest.fixture
def bucket(monkeypatch):
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="weights")
    yield client
    server.stop()


def test_s3(bucket, cache):
    content = os.urandom(300_000)
    bucket.put_object(Bucket="weights", Key="a/b.pth", Body=content)
    path = local_file("s3://weights/a/b.pth")
    assert path.read_bytes() == content
    path.unlink()
    # broken off earlier, at a third
    etag = bucket.head_object(Bucket="weights", Key="a/b.pth")["ETag"]
    Path(f"{path}.part").write_bytes(content[:100_000])
    Path(f"{path}.part.version").write_text(etag)
    assert local_file("s3://weights/a/b.pth").read_bytes() == content
    assert files(cache) == [".pth"]
    with pytest.raises(CheckpointError, match=r"s3://weights/none.pth does not exist\."):
        local_file("s3://weights/none.pth")
    with pytest.raises(CheckpointError, match=r"s3://nobucket/none\.pth"):
        local_file("s3://nobucket/none.pth")


def test_s3_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not there
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # loaded before
    with pytest.raises(CheckpointError, match=r"needs the package s3fs: pip install s3fs\.$"):
        local_file("s3://bucket/file.pth")
