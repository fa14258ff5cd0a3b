"""Jobs on hosts of their own, started by Amazon's real start scripts: one host and two, stopped, killed, unplugged.

Needs root and iproute2; run with `python -m pytest -m hosts`.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from dino_lightning.floor_plans import write_rooms_dataset
from sagemaker_entry import launch
from tests.export.exported import save, tiny_module
from tests.sagemaker_entry.conftest import TINY_CONFIG
from tests.sagemaker_entry.hosts import Network, fill, restore_checkpoints, usable

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not usable(), reason="needs root and iproute2 for network namespaces"),
]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """64 training plans: with two hosts and batches of two, 16 steps an epoch."""
    return write_rooms_dataset(tmp_path_factory.mktemp("plans") / "plans", num_train=64, num_val=4, size=160)


def submitted(aws, calls, folder, plans, config, count):
    """Launch against the local AWS; returns (start command, channels), as SageMaker would see them."""
    config_file = folder / "rooms' demo.yaml"
    config_file.write_text(yaml.safe_dump(config))
    args = ["--config", str(config_file), "--data", str(plans), "--role", "trainer", "--yes", "--detach"]
    args += ["--instance-type", "ml.g5.2xlarge", "--instance-count", str(count)]
    assert launch.main(args) == 0
    (request,) = [parameters for operation, parameters in calls if operation == "CreateTrainingJob"]
    channels = {}
    for channel in request["InputDataConfig"]:
        uri = channel["DataSource"]["S3DataSource"]["S3Uri"]
        channels[channel["ChannelName"]] = download(aws("s3"), uri, folder / "channels" / channel["ChannelName"])
    # No GPU here: what was planned with one A10G a host is run on the CPU.
    job_file = channels["config"] / "job.json"
    job_file.write_text(json.dumps({**json.loads(job_file.read_text()), "gpus_per_host": 0}))
    algorithm = request["AlgorithmSpecification"]
    return [*algorithm["ContainerEntrypoint"], *algorithm["ContainerArguments"]], channels


def download(s3, uri, folder):
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    base = prefix if prefix.endswith("/") else prefix.rpartition("/")[0] + "/"
    if not s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"][0]["Key"].endswith(prefix.rpartition("/")[2]):
        base = prefix.rstrip("/") + "/"
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page["Contents"]:
            target = folder / entry["Key"].removeprefix(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, entry["Key"], str(target))
    return folder


def run(hosts, command, channels, **variables):
    """Start the job on all hosts."""
    for host in hosts:
        fill(host, hosts, channels)
    for host in hosts:
        host.start(command, TRAINING_JOB_NAME="job", **variables)


def losses(host):
    with (host.root / "checkpoints" / "metrics.csv").open() as file:
        return {
            int(row["step"]): float(row["train/loss_step"]) for row in csv.DictReader(file) if row["train/loss_step"]
        }


def check_model(host):
    description = json.loads((host.root / "model" / "model.json").read_text())
    assert description["classes"] == [{"label": 0, "category_id": 1, "name": "room"}]
    assert (host.root / "model" / "code" / "inference.py").is_file()
    return description


def test_the_v3_start_script_trains_on_two_hosts_and_goes_on_after_sigterm(aws, calls, plans, tmp_path):
    config = {**TINY_CONFIG, "trainer": {"max_epochs": 2, "log_every_n_steps": 1}}
    command, channels = submitted(aws, calls, tmp_path, plans, config, 2)

    with Network(tmp_path / "whole", 2) as network:
        run(network.hosts, command, channels)
        assert [host.wait(300) for host in network.hosts] == [0, 0], network.hosts[0].text()[-3000:]
        whole = losses(network.hosts[0])
        assert check_model(network.hosts[0])["complete"] is True
        assert list((network.hosts[1].root / "model").iterdir()) == []
        assert not (network.hosts[1].root / "checkpoints" / "checkpoints").exists()
    assert len(whole) == 32

    with Network(tmp_path / "parts", 2) as network:
        run(network.hosts, command, channels)
        network.hosts[0].wait_for("epoch=1 epochs=2 batch 1 of 16")
        began = time.monotonic()
        network.hosts[1].signal(signal.SIGTERM)  # the hosts are not told at the same moment
        time.sleep(0.3)
        network.hosts[0].signal(signal.SIGTERM)
        assert [host.wait(120) for host in network.hosts] == [143, 143], network.hosts[0].text()[-3000:]
        assert time.monotonic() - began < 100
        saved = {host.text().split("checkpoint of step ")[1].split()[0] for host in network.hosts}
        assert len(saved) == 1
        step = int(saved.pop())
        assert 0 < step < 16
        assert not (network.hosts[0].root / "output" / "failure").exists()

        restore_checkpoints(network.hosts)
        run(network.hosts, command, channels)
        assert [host.wait(300) for host in network.hosts] == [0, 0], network.hosts[0].text()[-3000:]
        assert "resuming from the checkpoint" in network.hosts[0].text()
        resumed = losses(network.hosts[0])
    # Lightning writes a step's metrics after the callback that stops, so those of the last step before are not written.
    assert set(whole) - set(resumed) <= {step - 1}
    assert resumed == {number: whole[number] for number in resumed}


def test_the_v3_start_script_trains_on_one_host(aws, calls, plans, tmp_path):
    config = {**TINY_CONFIG, "trainer": {"max_epochs": 1, "log_every_n_steps": 1}}
    command, channels = submitted(aws, calls, tmp_path, plans, config, 1)
    with Network(tmp_path / "host", 1) as network:
        (host,) = network.hosts
        run(network.hosts, command, channels)
        assert host.wait(300) == 0, host.text()[-3000:]
        assert "not the container's first process" not in host.text()
        assert check_model(host)["complete"] is True


def test_four_processes_on_one_host_that_is_called_aws_end_with_the_model(aws, calls, plans, tmp_path):
    """torchrun --standalone waited for ever here: the name of the host does not resolve."""
    config = {**TINY_CONFIG, "trainer": {"max_epochs": 1, "log_every_n_steps": 1}}
    command, channels = submitted(aws, calls, tmp_path, plans, config, 1)
    with Network(tmp_path / "host", 1) as network:
        (host,) = network.hosts
        run(network.hosts, command, channels, DINO_CPU_PROCESSES="4")
        assert host.wait(300) == 0, host.text()[-3000:]
        assert len(losses(host)) == 8  # 64 images, 4 processes, batches of 2
        assert check_model(host)["complete"] is True


@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_a_host_that_dies_ends_the_others(aws, calls, plans, tmp_path, how):
    config = {**TINY_CONFIG, "trainer": {"max_epochs": 500, "log_every_n_steps": 1}}
    command, channels = submitted(aws, calls, tmp_path, plans, config, 2)
    with Network(tmp_path / "hosts", 2) as network:
        first, second = network.hosts
        run(network.hosts, command, channels)
        first.wait_for("epoch=1 epochs=500")
        began = time.monotonic()
        if how == "killed":
            second.signal(signal.SIGKILL)
        else:
            second.unplug()
        assert first.wait(60) == 1, first.text()[-3000:]
        if how == "unplugged":
            assert second.wait(60) == 1, second.text()[-3000:]
        assert time.monotonic() - began < 60
        reason = (first.root / "output" / "failure").read_text()
        assert "algo-2" in reason, reason


@pytest.mark.parametrize(
    ("case", "words"),
    [("shard", "is damaged"), ("image", "cannot be decoded"), ("checkpoint", "This host has no checkpoint")],
)
def test_a_failure_on_one_host_is_told_on_all(aws, calls, plans, tmp_path, case, words):
    config = {**TINY_CONFIG, "trainer": {"max_epochs": 500, "log_every_n_steps": 1}}
    command, channels = submitted(aws, calls, tmp_path, plans, config, 2)
    if case == "image":  # no manifest there, so nobody notices before training
        channels["training"] = plans
    with Network(tmp_path / "hosts", 2) as network:
        first, second = network.hosts
        for host in network.hosts:
            fill(host, network.hosts, channels)
        training = second.root / "input" / "data" / "training"
        if case == "shard":
            shard = next((training / "shards").glob("*.tar"))
            shard.write_bytes(shard.read_bytes()[:-5000])
        elif case == "image":
            for path in (training / "train" / "images").iterdir():
                path.write_bytes(b"\x89PNG nonsense")
        else:
            (first.root / "checkpoints" / "checkpoints").mkdir()
            save(tiny_module(), first.root / "checkpoints" / "checkpoints" / "last.ckpt")
        for host in network.hosts:
            host.start(command, TRAINING_JOB_NAME="job")
        assert [host.wait(90) for host in network.hosts] == [1, 1]
        for host in network.hosts:
            reason = (host.root / "output" / "failure").read_text()
            assert reason.startswith("[algo-2"), reason
            assert words in reason


@pytest.mark.parametrize("count", [1, 2])
def test_the_v2_toolkit_trains(plans, tmp_path, count):
    """Script mode, as jobs of the older SDK and of boto3 start: `train` of the package sagemaker-training."""
    toolkit = Path(sys.executable).parent / "train"
    if not toolkit.is_file():
        pytest.skip("needs the package sagemaker-training (extra `toolkit`)")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(TINY_CONFIG))
    hyperparameters = {
        "sagemaker_program": json.dumps("train_dino.py"),
        "sagemaker_submit_directory": json.dumps("/opt/ml/code"),
        "config": json.dumps("/opt/ml/code/config.yaml"),
        "trainer.max_epochs": "1",
    }
    with Network(tmp_path / "hosts", count) as network:
        for host in network.hosts:
            fill(host, network.hosts, {"training": plans}, hyperparameters)
            code = host.root / "code"
            code.mkdir()
            for package in ("dino_lightning", "sagemaker_entry"):
                shutil.copytree(Path(launch.__file__).parent.parent / package, code / package)
            shutil.copyfile(config, code / "config.yaml")
            (code / "train_dino.py").write_text(
                "import sys\nfrom sagemaker_entry.train import main\nsys.exit(main(sys.argv[1:]))\n"
            )
        for host in network.hosts:
            host.start([str(toolkit)], TRAINING_JOB_NAME="job")
        codes = [host.wait(300) for host in network.hosts]
        assert codes == [0] * count, network.hosts[0].text()[-4000:]
        check_model(network.hosts[0])
        assert "epoch=1 epochs=1 finished" in network.hosts[0].text()
