"""Stopping and resuming a job: what is asked of AWS, and what it can cost."""

import pytest
from botocore.stub import ANY

from sagemaker_entry.laptop import job_commands as jobs
from sagemaker_entry.laptop.follow import PRICE_TAG
from sagemaker_entry.protocol.problem import Problem
from tests.sagemaker_entry.stubs import JOB, NOW, add_price, description


def test_a_resumed_job_is_resumed_again_with_every_tag_once(account):
    stub = account.stub("sagemaker")
    stopped = description("Stopped", CheckpointConfig={"S3Uri": "s3://b/runs/1/checkpoints/"})
    request = {name: stopped[name] for name in ("AlgorithmSpecification", "CheckpointConfig")} | {
        "RoleArn": "arn:aws:iam::123456789012:role/trainer",
        "OutputDataConfig": {"S3OutputPath": "s3://b/runs/1/output/"},
        "ResourceConfig": stopped["ResourceConfig"],
        "StoppingCondition": stopped["StoppingCondition"],
    }
    tags = [{"Key": PRICE_TAG, "Value": "4.0000"}]
    stub.add_response("describe_training_job", {**stopped, **request})
    stub.add_response("list_tags", {"Tags": [{"Key": "resumes", "Value": "the first"}, *tags]})
    expected = {**request, "TrainingJobName": ANY, "Tags": [*tags, {"Key": "resumes", "Value": JOB}]}
    stub.add_response("create_training_job", {"TrainingJobArn": stopped["TrainingJobArn"]}, expected)
    jobs.resume(account, JOB)


@pytest.mark.parametrize(
    ("price", "keep_alive", "words"),
    [
        ("4.0000", {}, "for $8.00 on demand"),
        (None, {}, "for $6.06 on demand"),
        ("4.0000", {"KeepAlivePeriodInSeconds": 1800}, "for $10.00 on demand"),
    ],
)
def test_resuming_says_what_it_can_cost(account, price, keep_alive, words):
    stub = account.stub("sagemaker")
    stopped = description(
        "Stopped",
        CheckpointConfig={"S3Uri": "s3://b/runs/1/checkpoints/"},
        RoleArn="arn:aws:iam::123456789012:role/trainer",
        OutputDataConfig={"S3OutputPath": "s3://b/runs/1/output/"},
        StoppingCondition={"MaxRuntimeInSeconds": 7200},
    )
    stopped["ResourceConfig"] |= keep_alive
    stub.add_response("describe_training_job", stopped)
    if price is None:
        stub.add_response("list_tags", {"Tags": []})
    else:
        add_price(stub, price)
    stub.add_response("create_training_job", {"TrainingJobArn": stopped["TrainingJobArn"]})
    name, most = jobs.resume(account, JOB)
    assert name.startswith("dino-rooms-2gpu-")
    assert "another 2.0 hours at most" in most and words in most


def test_stopping(account):
    stub = account.stub("sagemaker")
    stub.add_response("describe_training_job", description())
    stub.add_response("stop_training_job", {}, {"TrainingJobName": JOB})
    assert "saves a checkpoint and stops" in jobs.stop(account.client("sagemaker"), JOB)
    stub.add_response("describe_training_job", description("Stopped", "Stopped"))
    assert "is Stopped already" in jobs.stop(account.client("sagemaker"), JOB)
    stub.add_response("describe_training_job", description())
    stub.add_client_error("stop_training_job", "AccessDeniedException")
    with pytest.raises(Problem, match="sagemaker:StopTrainingJob"):
        jobs.stop(account.client("sagemaker"), JOB)


def test_a_resumed_job_is_the_same_but_for_its_name():
    stopped = description(
        "Stopped",
        "Interrupted",
        RoleArn="arn:aws:iam::123456789012:role/trainer",
        CheckpointConfig={"S3Uri": "s3://b/runs/1/checkpoints/", "LocalPath": "/opt/ml/checkpoints"},
        InputDataConfig=[{"ChannelName": "training"}],
        Environment={},
        EnableManagedSpotTraining=True,
    )
    request = jobs.resume_request(stopped, NOW)
    assert request["TrainingJobName"] == "dino-rooms-2gpu-20261124120000"
    for name in ("CheckpointConfig", "InputDataConfig", "RoleArn", "ResourceConfig", "StoppingCondition"):
        assert request[name] == stopped[name]
    assert request["EnableManagedSpotTraining"] is True
    assert "TrainingJobStatus" not in request and "Environment" not in request
    stopped["TrainingJobName"] = request["TrainingJobName"]  # and again within the second
    assert jobs.resume_request(stopped, NOW)["TrainingJobName"] == "dino-rooms-2gpu-20261124120001"
    with pytest.raises(Problem, match="stop it first"):
        jobs.resume_request(description(), NOW)
    with pytest.raises(Problem, match="it is finished"):
        jobs.resume_request(description("Completed"), NOW)
    with pytest.raises(Problem, match="kept no checkpoints"):
        jobs.resume_request(description("Failed"), NOW)
