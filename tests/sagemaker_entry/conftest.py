"""A local AWS over HTTP, a role in it, and a small training."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.client import BaseClient

from tests.conftest import TINY_SIZES

REGION = "us-east-1"
TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Principal": {"Service": "sagemaker.amazonaws.com"}, "Action": "sts:AssumeRole"},
    ],
}
TINY_CONFIG = {
    "trainer": {"max_epochs": 2, "log_every_n_steps": 1},
    "data": {"num_workers": 0, "image_size": 64, "max_size": 96, "augmentation": "plans", "batch_size": 2},
    "model": {**TINY_SIZES, "backbone_weights": None},
}


@pytest.fixture
def tiny_config(tmp_path) -> Path:
    """A configuration that trains in seconds."""
    path = tmp_path / "tiny's rooms.yaml"  # an apostrophe: Amazon's start script breaks on one in a hyperparameter
    path.write_text(yaml.safe_dump(TINY_CONFIG))
    return path


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """A laptop on which nobody is logged in to AWS."""
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_DEFAULT_REGION",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def moto_address():
    """The address of a local server that answers as AWS does."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request drowns what a failed test says
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(moto_address, no_account, monkeypatch):
    """A fresh account behind the local server, with a role that SageMaker may take on; its clients by service name."""
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(f"{moto_address}/moto-api/reset", method="POST"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    boto3.client("iam").create_role(RoleName="trainer", AssumeRolePolicyDocument=json.dumps(TRUST))
    return boto3.client


@pytest.fixture
def calls(monkeypatch):
    """Every AWS call made, (operation, parameters); the calls themselves are made unchanged."""
    made = []
    original = BaseClient._make_api_call

    def spy(self, operation, parameters):
        made.append((operation, parameters))
        return original(self, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", spy)
    return made


@pytest.fixture(scope="session")
def model_dir(rooms, tmp_path_factory):
    """A model directory as a job leaves it."""
    import lightning
    import torch

    from dino_lightning import CocoDataModule, DINOModule
    from sagemaker_entry.train import write_model

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
