"""Passwords and signatures in addresses: used, and neither stored nor shown anywhere."""

import base64
import io
import shutil
import sys
import zipfile

import pytest
import torch

from dino_lightning.__main__ import run
from dino_lightning.console import lacks_secrets, without_secrets
from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.download import local_file
from sagemaker_entry import launch
from tests.conftest import TINY_ARGS, TINY_SIZES
from tests.weights.test_loading import Server

SECRETS = (b"pa:ss-word", b"pa%3Ass-word", b"signa-ture")


class PrivateServer(Server):
    """Gives its file to one user with one password, by a signed address."""

    def answer(self, handler):
        wanted = f"Basic {base64.b64encode(b'me:pa:ss-word').decode()}"
        if handler.headers.get("Authorization") != wanted or "Signature=signa-ture" not in handler.path:
            self.status = [403]
        super().answer(handler)

    @property
    def signed_address(self):
        return self.address.replace("http://", "http://me:pa%3Ass-word@") + "?X-Amz-Signature=signa-ture"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = io.BytesIO()
    torch.save({"model": DINO(num_classes=1, **TINY_SIZES).state_dict()}, content)
    server = PrivateServer()
    server.content = content.getvalue()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


def leaks(folder):
    """The files below a folder that hold a secret, in their name, their content or a member of an archive."""
    for path in folder.rglob("*"):
        contents = [str(path).encode()]
        if path.is_file():
            contents.append(path.read_bytes())
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    contents += [archive.read(name) for name in archive.namelist()]
        if any(secret in content for content in contents for secret in SECRETS):
            yield path


def test_a_run_from_a_private_address_keeps_no_secret(server, rooms, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--data.root", str(rooms), "--run_dir", "run", "--trainer.max_epochs=1", *TINY_ARGS]
    args += ["--trainer.log_every_n_steps=1", f"--model.weights={server.signed_address}"]
    monkeypatch.setattr(sys, "argv", ["dino_lightning", *args])
    assert run(args) == 0
    assert server.asked == [None]  # it was given
    stored = "http://***@127.0.0.1"
    for name in ("config.yaml", "run.json", "tensorboard/hparams.yaml"):
        assert stored in (tmp_path / "run" / name).read_text(), name
    assert stored in str(torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["hyper_parameters"])
    assert list((tmp_path / "run/tensorboard").glob("events*"))
    assert list((tmp_path / "cache").rglob("*.pth"))
    # Its configuration starts no new run, which is told at once.
    shutil.rmtree(tmp_path / "cache")
    assert run(["fit", "--config", "run/config.yaml", "--run_dir", "other"]) == 1
    said = capfd.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("error: --model.weights http://***@127.0.0.1") and "give --model.weights again" in last
    assert server.asked == [None] and not (tmp_path / "other").exists()
    # Resuming and evaluating need nothing from there.
    assert run(["fit", "--ckpt_path", "run"]) == 0
    resumed = capfd.readouterr()
    shutil.copy("run/checkpoints/best.ckpt", "copied.ckpt")
    assert run(["validate", "--ckpt_path", "copied.ckpt", "--data.root", str(rooms), "--report=false"]) == 0
    assert server.asked == [None]
    evaluated = capfd.readouterr()
    assert not list(leaks(tmp_path))
    printed = [text.encode() for output in (said, resumed, evaluated) for text in output]
    assert not [secret for text in printed for secret in SECRETS if secret in text]


def test_a_module_opens_the_address_that_it_does_not_store(server):
    module = DINOModule(num_classes=1, weights=server.signed_address, **TINY_SIZES)
    assert module.hparams["weights"] == module.hparams_initial["weights"] == without_secrets(server.signed_address)
    assert local_file(module.places["weights"]).read_bytes() == server.content
    with pytest.raises(CheckpointError, match=r"\*\*\*@127.0.0.1.* are not stored; give the whole address"):
        local_file(module.hparams["weights"])


def test_a_job_gets_no_secrets(rooms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "small.yaml"
    config.write_text("trainer:\n  max_epochs: 1\n")
    address = "https://me:pa%3Ass-word@host/w.ckpt?X-Amz-Signature=signa-ture"
    for place in (address, without_secrets(address)):
        args = ["--config", str(config), "--data", str(rooms), "--dry-run", f"--model.weights={place}"]
        assert launch.main(args) == 1
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith("error: --model.weights https://***@host/w.ckpt?***: everyone") and "s3://" in line
        assert not [secret for secret in SECRETS if secret.decode() in said.out + said.err]


def test_a_wrong_value_is_shown_without_its_secrets(rooms, capsys):
    address = "https://me:pa%3Ass-word@host/w.ckpt?X-Amz-Signature=signa-ture"
    for args in (["--model.lr", address], ["--ckpt_path", address], ["--config", address]):
        assert run(["fit", "--data.root", str(rooms), *args]) in (1, 2)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "***@host/w.ckpt" in error
        assert not [secret for secret in SECRETS if secret.decode() in error]


@pytest.mark.parametrize(
    "address, shown",
    [
        ("https://host/w.ckpt", "https://host/w.ckpt"),
        ("https://me@host:8080/w.ckpt", "https://***@host:8080/w.ckpt"),
        ("https://me:p@ss:'\"@host/w.ckpt", "https://***@host/w.ckpt"),
        ("s3://bucket/w.ckpt?versionId=1#sha256=0123abcd", "s3://bucket/w.ckpt?***#sha256=0123abcd"),
        ("https://host/w.ckpt#token=1", "https://host/w.ckpt#***"),
        ("--model.weights=https://a:b@host/w?c", "--model.weights=https://***@host/w?***"),
        ('{"weights": "https://a:b@host/w?c", "lr": 1}', '{"weights": "https://***@host/w?***", "lr": 1}'),
        ("two: http://a:b@c/d hf://me/rooms@main/x?y end", "two: http://***@c/d hf://me/rooms@main/x?*** end"),
        ("https:/a:b@host/w", "https:/***@host/w"),
        ("C:/plans/what?.png and a@b.c", "C:/plans/what?.png and a@b.c"),
    ],
    ids=["plain", "user", "odd password", "query", "fragment", "option", "json", "text", "path", "none"],
)
def test_what_is_left_of_an_address(address, shown):
    assert without_secrets(address) == without_secrets(shown) == shown
    assert lacks_secrets(shown) == ("***" in shown) and not lacks_secrets(address)
    assert without_secrets({"a": [address, 1], "b": (None,)}) == {"a": [shown, 1], "b": (None,)}
