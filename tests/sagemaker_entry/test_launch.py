"""`python -m sagemaker_entry.launch` against a local AWS over HTTP, as a user calls it."""

import io
import json
import re
import subprocess
import sys
import tarfile

import pytest
import yaml

from dino_lightning.cli.arguments import known_options
from sagemaker_entry import launch
from sagemaker_entry.laptop.fit_options import GO_ALONG, REFUSED, fit_arguments
from sagemaker_entry.laptop.parsers import COMMANDS, OF_THE_ACCOUNT
from sagemaker_entry.laptop.serving_options import COMMANDS as SERVING
from sagemaker_entry.laptop.source_archive import build_archive
from sagemaker_entry.laptop.submit import COMMAND, base_name
from sagemaker_entry.laptop.training_config import check_training
from sagemaker_entry.protocol.job import CONFIG_FILE, JOB_FILE
from tests.sagemaker_entry.conftest import TRUST
from tests.sagemaker_entry.service_model import violations

CONFIG = "configs/room_detection.yaml"


def run(capsys, *args):
    """(exit code, what was printed, errors)"""
    code = launch.main([str(arg) for arg in args])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def everything(s3, bucket="sagemaker-us-east-1-123456789012"):
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


def leaves(value, place=""):
    """Every value in a request by its place; lists of channels and tags by their names."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in leaves(inner, f"{place}.{name}").items()}
    if isinstance(value, list):
        named = {str(e.get("ChannelName") or e.get("Key") or e.get("Name") or i) if isinstance(e, dict) else str(i): e
                 for i, e in enumerate(value)}  # fmt: skip
        return leaves(named, place)
    return {place: value}


def differences(planned, sent):
    """Places where two requests differ, but for what the plan cannot know, which it writes as <word>."""
    planned, sent = leaves(planned), leaves(sent)

    def same(place):
        words = re.sub("<[a-z]+>", "[^/]+", re.escape(str(planned.get(place))))
        return place in planned and place in sent and re.fullmatch(words, str(sent[place]))

    return [f"{place}: {planned.get(place)} {sent.get(place)}" for place in {**planned, **sent} if not same(place)]


# ------------------------------------------------------------------ planning


def test_a_dry_run_needs_no_account_and_tells_the_truth_about_g5(no_account, rooms, capsys):
    code, out, _ = run(capsys, "--config", CONFIG, "--data", rooms, "--dry-run")
    assert code == 0
    assert "2 x ml.g5.2xlarge, $3.03 an hour together" in out
    assert "ONE A10G" in out
    assert "cheaper       1 x ml.g5.2xlarge (--instance-count 1): about $" in out
    assert "Planned without an account" in out
    request = json.loads(out[out.index("{\n") :])
    assert request["ResourceConfig"]["InstanceCount"] == 2
    assert request["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert not request["EnableManagedSpotTraining"]
    assert "HyperParameters" not in request


def test_a_dry_run_touches_nothing(aws, rooms, capsys, calls):
    code, out, _ = run(capsys, "--config", CONFIG, "--data", rooms, "--dry-run", "--spot", "--gpus", "1")
    assert code == 0
    request = json.loads(out[out.index("{\n") :])
    assert "cheaper" not in out  # the user has chosen
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"]["MaxWaitTimeInSeconds"] > request["StoppingCondition"]["MaxRuntimeInSeconds"]
    changing = ("Put", "Create", "Delete", "Upload", "Start")
    assert not [operation for operation, _ in calls if operation.startswith(changing)]


def test_options_of_fit_go_along(no_account, rooms, capsys):
    code, out, _ = run(
        capsys, "--config", CONFIG, "--data", rooms, "--dry-run", "--trainer.max_epochs=7", "--data.batch_size=3"
    )
    assert code == 0
    assert "x 7 epochs" in out
    assert "6 (3 on each GPU)" in out


TRANSFORMS = """
data:
  repeat_factor_threshold: 1.0
  drawn_plans: 2
  transforms:
    - class_path: torchvision.transforms.v2.RandomApply
      init_args:
        transforms:
          - class_path: {path}
"""


def test_own_transforms_and_repeats_go_along(no_account, rooms, tiny_config, tmp_path):
    config = tmp_path / "own.yaml"
    with_own = yaml.safe_load(tiny_config.read_text())
    with_own["data"] |= yaml.safe_load(TRANSFORMS.format(path="torchvision.transforms.v2.RandomInvert"))["data"]
    config.write_text(yaml.safe_dump(with_own))
    training = check_training(str(config), str(rooms), [])
    assert yaml.safe_load(training.config)["data"]["transforms"] == with_own["data"]["transforms"]
    assert (training.train_images, training.extras) == (10, ())


def test_a_job_installs_the_packages_of_its_transforms_or_refuses_them(
    no_account, rooms, tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    pytest.importorskip("albumentations")
    listed = ["torch>=2", "numpy>=1", "albumentations>=2.0; extra == 'albumentations'", "timm>=1; extra == 'timm'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: listed)
    option = '--data.transforms=[{"class_path": "albumentations.Blur"}]'
    training = check_training(str(tiny_config), str(rooms), [option])
    assert training.extras == ("albumentations",) and training.arguments == (option,)
    with tarfile.open(fileobj=io.BytesIO(build_archive(training.backbone, training.extras))) as archive:
        assert archive.extractfile("requirements.txt").read().split() == [b"numpy>=1", b"albumentations>=2.0"]
    (tmp_path / "mine_alone.py").write_text("from torchvision.transforms import v2\nclass Mine(v2.RandomInvert): pass")
    monkeypatch.syspath_prepend(tmp_path)
    option = '--data.transforms=[{"class_path": "mine_alone.Mine"}]'
    code, _, errors = run(capsys, "--config", tiny_config, "--data", rooms, "--dry-run", option)
    assert code == 1 and "--data.transforms: mine_alone.Mine is of a package that the job does not have" in errors


@pytest.mark.parametrize("place", ["https://example.org/dino.pth", "s3://bucket/dino.pth", "IMAGENET1K_V2"])
def test_weights_that_the_container_downloads_go_along_by_name(no_account, rooms, place):
    training = check_training(CONFIG, str(rooms), [f"--model.weights={place}"])
    assert training.arguments == (f"--model.weights={place}",)
    assert training.weights == {}


@pytest.mark.parametrize(
    ("devices", "gpus"), [("2", 2), ("0,1", 2), ("0,", 1), ("[0,1,2]", 3), ("-1", 1), ("auto", 1), (None, 1)]
)
def test_the_gpus_that_the_options_ask_for(no_account, rooms, tiny_config, devices, gpus):
    extra = [] if devices is None else [f"--trainer.devices={devices}"]
    assert check_training(str(tiny_config), str(rooms), extra).gpus_wanted == gpus


def test_weights_of_the_backbone_stay_here_where_those_of_the_model_are_given(no_account, rooms, tiny_config, tmp_path):
    import torch

    whole, backbone = tmp_path / "whole.pth", tmp_path / "backbone.pth"
    for path in (whole, backbone):
        torch.save({"decoder.norm.weight": torch.zeros(1)}, path)
    options = [f"--model.weights={whole}", f"--model.backbone_weights={backbone}", "--model.lr=0.0002"]
    training = check_training(str(tiny_config), str(rooms), options)
    assert training.weights == {"model.weights": whole}
    assert training.arguments == ("--model.lr=0.0002",)
    training = check_training(str(tiny_config), str(rooms), ["--model.weights=s3://b/dino.pth", options[1]])
    assert training.weights == {}
    assert training.arguments == ("--model.weights=s3://b/dino.pth",)
    training = check_training(str(tiny_config), str(rooms), options[1:])
    assert training.weights == {"model.backbone_weights": backbone}


@pytest.mark.slow
def test_a_price_of_another_region_is_pointed_out_and_caps_nothing(aws, rooms, tiny_config, capsys, monkeypatch):
    from sagemaker_entry.laptop import preflight

    args = ["--config", tiny_config, "--data", rooms, "--gpus", "1", "--dry-run"]
    monkeypatch.setattr(preflight, "live_price", lambda *args: None)
    for where, other in ((["--region", "eu-west-1"], "us-east-1"), (["--instance-type", "g6.xlarge"], "us-west-2")):
        code, out, _ = run(capsys, *args, *where)
        assert code == 0
        assert f"NOTE: The price is that of {other}" in out
        code, out, err = run(capsys, *args, *where, "--max-cost", "20")
        assert code == 1 and "Plan" not in out
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert "--max-cost cannot be kept" in line and "pricing:GetProducts" in line and "--max-run-hours" in line
    monkeypatch.setattr(preflight, "live_price", lambda *args: 2.0)
    code, out, _ = run(capsys, *args, "--region", "eu-west-1", "--max-cost", "20")
    assert code == 0 and "The price is that of" not in out
    request = json.loads(out[out.index("{\n") :])
    assert {"Key": "dollars-per-hour", "Value": "2.0000"} in request["Tags"]


# ------------------------------------------------------------------ the whole way


def test_launch_upload_submit_status_fetch(aws, rooms, tiny_config, tmp_path, capsys, calls, monkeypatch):
    pytest.importorskip("sagemaker.train")
    from sagemaker.core.telemetry import telemetry_logging

    told = []
    monkeypatch.setattr(telemetry_logging, "_send_telemetry_request", lambda *args, **kwargs: told.append(args))
    weights = tmp_path / "it's a start.pth"
    import torch

    torch.save({"decoder.norm.weight": torch.zeros(1)}, weights)
    args = ["--config", tiny_config, "--data", rooms, "--role", "trainer", "--gpus", "2", "--spot", "--max-cost", "20"]
    args += ["--yes", "--detach", "--model.lr=0.0002", f"--model.weights={weights}", "--data.val_fraction=0.2"]
    code, out, _ = run(capsys, *args, "--dry-run")
    planned = json.loads(out[out.index("{\n") :])
    assert "bucket   sagemaker-us-east-1-123456789012, will be created" in out
    code, out, _ = run(capsys, *args)
    assert code == 0, out
    assert "MB sent" in out
    assert "arn:aws:iam::123456789012:role/trainer, SageMaker may assume it" in out
    assert "quota    not checked" in out and "in order" not in out  # the local AWS knows no quotas
    name = out.split("Started ")[1].split()[0]
    assert name.startswith("dino-tiny-s-rooms-2gpu-")

    assert not told  # the SDK reports nothing home

    # what SageMaker was asked for
    (request,) = [parameters for operation, parameters in calls if operation == "CreateTrainingJob"]
    assert differences(planned, request) == []
    assert request["ResourceConfig"]["InstanceType"] == "ml.g5.2xlarge"
    assert request["ResourceConfig"]["InstanceCount"] == 2
    assert request["EnableManagedSpotTraining"] is True
    stopping = request["StoppingCondition"]
    assert 0 < stopping["MaxRuntimeInSeconds"] <= 20 / 3.03 * 3600
    assert stopping["MaxWaitTimeInSeconds"] >= stopping["MaxRuntimeInSeconds"]
    assert request["HyperParameters"] == {}
    assert request["Environment"] == {"PYTHONUNBUFFERED": "1"}
    assert request["RetryStrategy"] == {"MaximumRetryAttempts": 2}
    metrics = {entry["Name"] for entry in request["AlgorithmSpecification"]["MetricDefinitions"]}
    assert {"train:loss", "val:AP", "val:F1"} <= metrics
    assert {"Key": "project", "Value": "dino-lightning"} in request["Tags"]
    assert {"Key": "dollars-per-hour", "Value": "3.0300"} in request["Tags"]
    channels = {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in request["InputDataConfig"]}
    assert set(channels) == {"training", "config", "weights", "code", "sm_drivers"}

    # what lies in S3
    s3, bucket = aws("s3"), "sagemaker-us-east-1-123456789012"

    def content(uri, name=""):
        return s3.get_object(Bucket=bucket, Key=uri.removeprefix(f"s3://{bucket}/") + name)["Body"].read()

    config = yaml.safe_load(content(channels["config"], CONFIG_FILE))
    assert config["model"]["hidden_dim"] == 32 and "root" not in config["data"]
    job = json.loads(content(channels["config"], JOB_FILE))
    assert job == {
        "arguments": ["--model.lr=0.0002", "--data.val_fraction=0.2"],
        "config": None,
        "hosts": 2,
        "gpus_per_host": 1,
        "trial": False,
        "weights": {"model.weights": "it's a start.pth"},
    }
    with tarfile.open(fileobj=io.BytesIO(content(channels["code"]))) as tar:
        names = tar.getnames()
        needed = tar.extractfile("requirements.txt").read().decode().split("\n")
    assert {"sagemaker_entry/train.py", "dino_lightning/fit.py", "dino_lightning/configs/rooms_demo.yaml"} <= set(names)
    assert any(line.startswith("lightning") for line in needed)
    assert not any(line.startswith(("torch>", "torch=", "torchvision", "sagemaker", "pytest")) for line in needed)
    assert COMMAND.encode() in content(channels["sm_drivers"], "/sm_train.sh")

    # nothing is sent twice
    calls.clear()
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert "0 bytes sent" in out
    again = [parameters["Key"] for operation, parameters in calls if operation == "PutObject"]
    assert again and all("/runs/" in key for key in again)

    # the job, and its model
    code, out, _ = run(capsys, "status", name)
    assert code == 0
    assert f"{name}: Completed" in out
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        member = tarfile.TarInfo("model.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    uri = aws("sagemaker").describe_training_job(TrainingJobName=name)["ModelArtifacts"]["S3ModelArtifacts"]
    key = uri.removeprefix(f"s3://{bucket}/")
    code, _, err = run(capsys, "fetch", name, "--to", tmp_path / "fetched")
    assert code == 1 and "left no model" in err
    s3.put_object(Bucket=bucket, Key=key, Body=archive.getvalue())
    code, out, _ = run(capsys, "fetch", name, "--to", tmp_path / "fetched")
    assert code == 0
    assert (tmp_path / "fetched" / "model.json").read_text() == "{}"
    code, _, err = run(capsys, "fetch", name, "--to", tmp_path / "fetched")
    assert code == 1 and "exists already" in err
    evil = io.BytesIO()
    with tarfile.open(fileobj=evil, mode="w:gz") as tar:
        member = tarfile.TarInfo("../evil.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    s3.put_object(Bucket=bucket, Key=key, Body=evil.getvalue())
    code, _, err = run(capsys, "fetch", name, "--to", tmp_path / "other")
    assert code == 1 and "outside of the folder" in err
    assert not list(tmp_path.rglob("evil.json")) and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_job_without_a_network_takes_its_packages_along(
    aws, rooms, tiny_config, tmp_path, capsys, calls, monkeypatch
):
    pytest.importorskip("sagemaker.train")
    from sagemaker_entry.laptop import start

    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a-1-py3-none-any.whl").write_bytes(b"wheel")
    asked = []
    monkeypatch.setattr(start, "wheelhouse", lambda lines, python: asked.append((lines, python)) or tmp_path / "wheels")
    args = ["--config", tiny_config, "--data", rooms, "--role", "trainer", "--yes", "--detach", "--network-isolation"]
    args += ["--tags", "team=vision,cost-center=42", "--keep-alive", "30", "--input-mode", "FastFile"]
    args += ["--instance-count", "2"]
    code, out, _ = run(capsys, *args, "--dry-run")
    assert code == 0
    plan = " ".join(out.partition("{\n")[0].split())  # its rows are wrapped
    assert "none; packages go along as wheels for Python 3.13" in plan
    assert "instances wait 30 minutes for a next job" in plan and "billed: $1.51 at most, counted below" in plan
    assert "with interruptions; --spot in place of --keep-alive" in plan
    assert "GB for the dataset, streamed and unpacked, of 450 GB" in plan
    planned = json.loads(out[out.index("{\n") :])
    code, out, _ = run(capsys, *args)
    assert code == 0, out
    assert out.count("not checked (servicequotas:") == 2  # of the job, and of the warm pool
    (request,) = [parameters for operation, parameters in calls if operation == "CreateTrainingJob"]
    assert differences(planned, request) == []
    assert violations("CreateTrainingJob", request) == []
    assert request["EnableNetworkIsolation"] is True
    assert request["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 1800
    assert {"Key": "team", "Value": "vision"} in request["Tags"]
    channels = {channel["ChannelName"]: channel for channel in request["InputDataConfig"]}
    assert channels["training"]["InputMode"] == "FastFile"
    packages = channels["packages"]["DataSource"]["S3DataSource"]["S3Uri"]
    ((lines, python),) = asked
    assert python == "3.13" and any(line.startswith("lightning") for line in lines)
    key = packages.partition("sagemaker-us-east-1-123456789012/")[2] + "/a-1-py3-none-any.whl"
    assert key in everything(aws("s3"))


@pytest.mark.slow
def test_following_shows_the_log(aws, rooms, tiny_config, capsys, monkeypatch):
    pytest.importorskip("sagemaker.train")
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    code, out, _ = run(
        capsys, "--config", tiny_config, "--data", rooms, "--role", "trainer", "--yes", "--instance-count", "1"
    )
    assert code == 0
    name = out.split("Started ")[1].split()[0]
    logs, stream = aws("logs"), f"{name}/algo-1-1"
    if "/aws/sagemaker/TrainingJobs" not in [g["logGroupName"] for g in logs.describe_log_groups()["logGroups"]]:
        logs.create_log_group(logGroupName="/aws/sagemaker/TrainingJobs")
    logs.create_log_stream(logGroupName="/aws/sagemaker/TrainingJobs", logStreamName=stream)
    now = int(time.time() * 1000)
    logs.put_log_events(
        logGroupName="/aws/sagemaker/TrainingJobs",
        logStreamName=stream,
        logEvents=[{"timestamp": now, "message": "[dino] epoch=2 epochs=2 finished val_F1=0.5"}],
    )
    code, out, _ = run(capsys, "attach", name)
    assert code == 0
    assert "[dino] epoch=2 epochs=2 finished val_F1=0.5" in out
    assert "epoch 2/2 | F1 0.500" in out
    assert f"{name}: Completed" in out


def test_resuming_a_stopped_job(aws, rooms, tiny_config, capsys, calls, monkeypatch):
    pytest.importorskip("sagemaker.train")
    from sagemaker_entry.laptop import job_commands as jobs

    args = ["--config", tiny_config, "--data", rooms, "--role", "trainer", "--yes", "--detach"]
    code, out, _ = run(capsys, *args)
    name = out.split("Started ")[1].split()[0]
    code, _, err = run(capsys, "resume", name)
    assert code == 1 and "it is finished" in err  # the local AWS completes jobs at once
    original = jobs.describe
    stopped = {"TrainingJobStatus": "Stopped"}
    monkeypatch.setattr(jobs, "describe", lambda client, job: {**original(client, job), **stopped})
    code, out, _ = run(capsys, "resume", name, "--detach")
    assert code == 0, out
    assert "It runs for another" in out and "on demand at most, on top of what" in out
    first, second = [parameters for operation, parameters in calls if operation == "CreateTrainingJob"]
    assert second["TrainingJobName"] != name
    assert second["CheckpointConfig"] == first["CheckpointConfig"]
    assert second["InputDataConfig"] == first["InputDataConfig"]
    assert {"Key": "resumes", "Value": name} in second["Tags"]
    assert {"Key": "dollars-per-hour", "Value": "1.5150"} in second["Tags"]


@pytest.mark.slow
def test_nobody_to_ask_and_no(aws, rooms, tiny_config, capsys, monkeypatch):
    pytest.importorskip("sagemaker.train")
    args = ["--config", tiny_config, "--data", rooms, "--role", "trainer"]
    code, _, err = run(capsys, *args)
    assert code == 1 and "--yes" in err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    code, out, _ = run(capsys, *args)
    assert code == 1 and "Nothing was uploaded or started" in out
    assert aws("s3").list_buckets()["Buckets"] == []


# ------------------------------------------------------------------ bad input


def broken_dataset(folder, rooms):
    import shutil

    shutil.copytree(rooms, folder)
    path = folder / "train" / "annotations.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 77
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--data": "nowhere"}, ["nowhere", "does not exist"]),
        ({"--data": "broken"}, ["category_id 77"]),
        ({"--data": None}, ["--data is needed"]),
        ({"--config": "none.yaml"}, ["none.yaml does not exist", "With this package come coco_r50_4scale_12ep"]),
        ({"--config": "room_detector"}, ["room_detector does not exist", "configs/room_detection.yaml"]),
        ({"--config": "bad.yaml"}, ["nun_queries", "Did you mean --model.num_queries?"]),
        ({"--config": "text.yaml"}, ["text.yaml"]),
        ({"--config": "endless.yaml"}, ["max_epochs", "what the run costs"]),
        ({"--model.hiden_dim=3": ""}, ["Did you mean --model.hidden_dim?"]),
        ({"--ema_decay": "1.5"}, ["ema_decay=1.5 must be between 0 and 1"]),
        ({"--best_by": "val/f2"}, ["--best_by val/f2: validation has no such metric"]),
        ({"--save_every_minutes": "-3"}, ["--save_every_minutes is -3.0"]),
        ({"--auto_batch_size": "1", "--gpus": "2"}, ["--auto_batch_size 1 must be at least 2"]),
        ({"--auto_batch_size": "8", "--trainer.accumulate_grad_batches": "2"}, ["chooses the accumulation itself"]),
        ({"--trainer.callbacks+=mine.Callback": ""}, ["--trainer.callbacks"]),
        ({"--trainer.enable_checkpointing": "false"}, ["leaves no model"]),
        ({"--trainer.limit_train_batches": "0"}, ["train nothing"]),
        ({"--model.weights=none.pth": ""}, ["none.pth does not exist"]),
        ({"--instance-type": "ml.g5.3xlarge"}, ["no instance type ml.g5.3xlarge"]),
        ({"--max-cost": "0.01"}, ["over before training begins"]),
        ({"--region": "us-east-9"}, ["no region 'us-east-9'"]),
        ({"--role": None}, ["--role is needed"]),
        ({"--role": "nobody"}, ["no role 'nobody'"]),
        ({"--role": "stranger"}, ["trust relationship"]),
        ({"--bucket": "far-away"}, ["is in eu-west-1"]),
        ({"--bucket": "My_Bucket"}, ["--bucket My_Bucket is no name of a bucket"]),
        ({"--subnets": "subnet-1a"}, ["--subnets needs --security-groups"]),
        ({"--security-groups": "sg-1a"}, ["--security-groups needs --subnets"]),
        ({"--subnets": "vpc-1", "--security-groups": "sg-1a"}, ["'vpc-1' is no id"]),
        ({"--max-wait-hours": "3"}, ["add --spot"]),
        ({"--image": "foo bar"}, ["'foo bar' is no address of an image in ECR"]),
        ({"--torch": "2.15"}, ["--torch 2.15: the table has images of PyTorch"]),
        ({"--kms-key": "my key"}, ["no id, alias or ARN of a KMS key"]),
        ({"--tags": "aws:team=x"}, ["--tags: aws:team begins with aws:"]),
        (
            {"--network-isolation": "", "--model.weights=dino_r50_4scale_24ep": ""},
            ["--network-isolation: the container cannot fetch", "weights get dino_r50_4scale_24ep` first"],
        ),
        (
            {"--network-isolation": "", "--model.backbone_weights=pretrained": ""},
            ["cannot fetch --model.backbone_weights=pretrained", "give the file, as --model.backbone_weights=FILE"],
        ),
    ],
)
def test_bad_input_ends_in_one_sentence_and_nothing_is_sent(
    aws, rooms, tiny_config, tmp_path, monkeypatch, capsys, calls, change, words
):
    monkeypatch.chdir(tmp_path)
    broken_dataset(tmp_path / "broken", rooms)
    (tmp_path / "bad.yaml").write_text("model:\n  nun_queries: 3\n")
    (tmp_path / "text.yaml").write_text("just text")
    (tmp_path / "endless.yaml").write_text("model:\n  lr: 0.1\n")
    trust = json.dumps(TRUST).replace("sagemaker.", "ec2.")
    aws("iam").create_role(RoleName="stranger", AssumeRolePolicyDocument=trust)
    where = {"CreateBucketConfiguration": {"LocationConstraint": "eu-west-1"}}
    aws("s3", region_name="eu-west-1").create_bucket(Bucket="far-away", **where)
    calls.clear()
    options = {"--config": tiny_config, "--data": rooms, "--role": "trainer", "--yes": "", "--detach": "", **change}
    args = [part for name, value in options.items() if value is not None for part in (name, value) if part != ""]
    code, _, err = run(capsys, *args)
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
    assert not [operation for operation, _ in calls if operation.startswith(("Put", "Create"))]


def test_without_credentials_nothing_begins(no_account, rooms, tiny_config, capsys):
    code, _, err = run(
        capsys, "--config", tiny_config, "--data", rooms, "--role", "trainer", "--yes", "--region", "us-east-1"
    )
    assert code == 1
    assert "no AWS credentials" in err


def test_a_dry_run_plans_though_aws_does_not_answer(aws, rooms, capsys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    code, out, _ = run(capsys, "--config", CONFIG, "--data", rooms, "--dry-run")
    assert code == 0
    assert "prices are from the table; role, bucket, quota and image are not looked at. (AWS cannot be reached" in out
    assert json.loads(out[out.index("{\n") :])["ResourceConfig"]["InstanceCount"] == 2


def test_a_launch_that_would_be_refused_is_said_by_a_dry_run(aws, rooms, capsys):
    code, out, _ = run(capsys, "--config", CONFIG, "--data", rooms, "--dry-run", "--role", "nobody")
    assert code == 0
    assert "A launch would be refused now: --role: account 123456789012 has no role 'nobody'" in out


def test_without_the_sdk_it_says_what_to_install(aws, rooms, tiny_config, capsys, monkeypatch, calls):
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "sagemaker" else True)
    code, _, err = run(capsys, "--config", tiny_config, "--data", rooms, "--role", "trainer", "--yes")
    assert code == 1
    assert "needs sagemaker: python -m pip install 'dino-lightning[sagemaker]'" in err
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--gpu=2", "Did you mean --gpus?"),
        ("--ema_dcay 0.9", "Did you mean --ema_decay?"),
        ("surprise", "'surprise' belongs to no option"),
        ("--model.lr 0.1 surprise", "'surprise' belongs to no option"),
        ("-c other.yaml", "There is no option -c"),
        ("--model.lr", "--model.lr needs a value"),
        ("--auto_batch_size --dry-run", "--auto_batch_size needs a value"),
        ("--run_dir=x", "--run_dir does not go along with launch: a job keeps its run folder in S3"),
        ("--overwrite", "each launch has a run folder of its own"),
        ("--ckpt_path last", "`resume JOB` continues a job"),
        ("--wandb project", "no login for Weights & Biases"),
        ("--trainer.strategy=fsdp", "the job sets it by the GPUs of its machines"),
        ("--trainer.fast_dev_run=true", "--trial measures a job"),
    ],
)
def test_options_that_do_not_go_along(arguments, words, rooms, capsys):
    assert launch.main(["--config", CONFIG, "--data", str(rooms), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_every_option_of_fit_goes_along_or_is_refused_with_a_reason():
    own = {f"--{name}" for name in known_options() if "." not in name}
    own -= {"--config", "--data", "--data.help", "--model.help", "--trainer.help"}  # of launch itself
    told = {*GO_ALONG, *(name for name in REFUSED if "." not in name)}
    added_by_lightning = {"--optimizer", "--lr_scheduler", "--weights_only"}
    assert told - added_by_lightning == own
    assert not set(GO_ALONG) & set(REFUSED)


def test_options_in_one_word_or_two_reach_the_job(no_account, rooms, tiny_config):
    given = ["--ema_decay", "0.99", "--trainer.max_steps", "-1", "--best_by=val/F1"]
    given += ["--optimizer", "AdamW", "--optimizer.lr", "0.001"]
    arguments = fit_arguments(given, [])
    training = check_training(str(tiny_config), str(rooms), arguments)
    assert training.arguments == (
        "--ema_decay=0.99", "--trainer.max_steps=-1", "--best_by=val/F1", "--optimizer=AdamW", "--optimizer.lr=0.001",
    )  # fmt: skip
    assert training.options["ema_decay"] == 0.99
    assert training.options["optimizer"]["init_args"]["lr"] == 0.001


@pytest.mark.parametrize("command", [[], *([name] for name in (*COMMANDS, *OF_THE_ACCOUNT, *SERVING))])
def test_help_fits_80_columns_and_spells_names_as_they_are(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        launch.main([*command, "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "s3," not in printed and "from s3" not in printed and " ap " not in printed


def test_help_is_quick_and_names_the_commands():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sagemaker_entry.launch", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for word in ("--dry-run", "--spot", "status JOB", "resume JOB", "--max-cost"):
        assert word in done.stdout
    assert "torch" not in done.stderr  # the slow imports come later


def test_job_names_tell_what_they_are_and_fit():
    assert base_name("room_detection", 2) == "dino-room-detection-2gpu"
    assert len(base_name("x" * 100, 16)) + len("-20261124120000") <= 63
    assert base_name("***", 1) == "dino-job-1gpu"


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--trial"]])
def test_a_local_run_needs_none_of_the_packages_of_aws(rooms, tiny_config, tmp_path, more):
    code = """
import sys
for name in ("boto3", "botocore", "sagemaker"): sys.modules[name] = None
from sagemaker_entry.laptop import local_run
local_run.run_locally = lambda root: (7, None)
from sagemaker_entry import launch
sys.exit(launch.main(sys.argv[1:]))
"""
    options = ["--config", tiny_config, "--data", rooms, "--local", "--local-dir", tmp_path, *more]
    done = subprocess.run([sys.executable, "-c", code, *map(str, options)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


def test_a_local_run_names_the_options_without_effect_once(no_account, rooms, tiny_config, capsys):
    plain = ["--config", tiny_config, "--data", rooms, "--local", "--dry-run", "--yes", "--model.lr=0.001"]
    code, out, _ = run(capsys, *plain)
    assert code == 0 and "no effect" not in out
    assert "Dry run: options and dataset are right; nothing was run." in out
    account = ["--role", "r", "--bucket", "mine", "--spot", "--kms-key", "k", "--tags", "a=1", "--keep-alive", "5"]
    code, out, err = run(capsys, *plain, *account)
    assert code == 1 and "--keep-alive keeps on-demand instances, and --spot takes others" in err
    code, out, _ = run(capsys, *plain, *account[:-2], "--input-mode", "FastFile", "--gpus", "4", "--detach")
    assert code == 0 and out.count("no effect") == 1
    names = "--gpus, --spot, --bucket, --kms-key, --tags, --input-mode and --detach"
    assert f"With --local, --role, {names} have no effect: " in out


def test_a_folder_for_a_local_run_needs_the_local_run(capsys):
    code, _, err = run(capsys, "--config", CONFIG, "--local-dir", "here")
    assert code == 2 and "--local-dir is the folder of --local, which is missing." in err
