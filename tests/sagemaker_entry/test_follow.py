"""A job on the laptop: its log without losing the tail, the line of progress, and how one comes back."""

import datetime

import pytest

from sagemaker_entry import jobs
from sagemaker_entry.follow import LOG_GROUP, Logs, Progress, describe, dollars, follow, summary
from sagemaker_entry.problem import Problem
from sagemaker_entry.progress import METRICS, metric_regex, read_figures
from tests.sagemaker_entry.stubs import StubbedAccount

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.timezone.utc)
JOB = "dino-rooms-2gpu-20261124110000"
LINE = "[dino] epoch=10 epochs=50 finished train_loss=8.1250 val_loss=7.5000 val_AP=0.4123 val_AP50=0.7 val_F1=0.6512"


@pytest.fixture
def account():
    made = StubbedAccount()
    yield made
    made.assert_all_asked()


def description(status="InProgress", secondary="Training", hosts=2, **more):
    return {
        "TrainingJobName": JOB,
        "TrainingJobArn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{JOB}",
        "ModelArtifacts": {"S3ModelArtifacts": "s3://b/model.tar.gz"},
        "TrainingJobStatus": status,
        "SecondaryStatus": secondary,
        "AlgorithmSpecification": {"TrainingInputMode": "File"},
        "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": hosts, "VolumeSizeInGB": 100},
        "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
        "CreationTime": NOW,
        **more,
    }


def events(*messages):
    return [{"timestamp": stamp, "message": message} for stamp, message in messages]


def add_page(stub, stream, token, messages, following):
    place = {"nextToken": token} if token else {"startFromHead": True}
    stub.add_response(
        "get_log_events",
        {"events": events(*messages), "nextForwardToken": following},
        {"logGroupName": LOG_GROUP, "logStreamName": stream, **place},
    )


def add_streams(stub, *names):
    stub.add_response(
        "describe_log_streams",
        {"logStreams": [{"logStreamName": name} for name in names]},
        {"logGroupName": LOG_GROUP, "logStreamNamePrefix": f"{JOB}/"},
    )


# ------------------------------------------------------------------ logs


def test_all_pages_of_all_hosts_are_read_in_order_of_time(account):
    stub = account.stub("logs")
    one, two = f"{JOB}/algo-1-1700000000", f"{JOB}/algo-2-1700000000"
    add_streams(stub, one, two)
    add_page(stub, one, None, [(1, "first\n"), (5, "fifth")], "f/1")
    add_page(stub, one, "f/1", [], "f/2")  # a page may be empty though more follow
    add_page(stub, one, "f/2", [(7, "seventh")], "f/3")
    add_page(stub, one, "f/3", [], "f/3")
    add_page(stub, two, None, [(3, "third")], "g/1")
    add_page(stub, two, "g/1", [], "g/1")
    logs = Logs(account.client("logs"), JOB)
    assert logs.read() == [("algo-1", "first"), ("algo-2", "third"), ("algo-1", "fifth"), ("algo-1", "seventh")]
    add_streams(stub, one, two)
    add_page(stub, one, "f/3", [(9, "ninth")], "f/4")
    add_page(stub, one, "f/4", [], "f/4")
    add_page(stub, two, "g/1", [], "g/1")
    assert logs.read() == [("algo-1", "ninth")]


def test_a_job_without_a_log_yet(account):
    account.stub("logs").add_client_error("describe_log_streams", "ResourceNotFoundException")
    assert Logs(account.client("logs"), JOB).read() == []


def test_lines_that_arrive_after_the_end_are_shown(account):
    stub, stream = account.stub("logs"), f"{JOB}/algo-1-1"
    jobs_stub = account.stub("sagemaker")
    jobs_stub.add_response("describe_training_job", description())
    add_streams(stub, stream)
    add_page(stub, stream, None, [(1, LINE)], "f/1")
    add_page(stub, stream, "f/1", [], "f/1")
    tail = [[], [(2, "the last words")], [], [], []]
    token = 1
    for messages in tail:
        jobs_stub.add_response("describe_training_job", description("Completed", "Completed"))
        add_streams(stub, stream)
        following = token + bool(messages)
        add_page(stub, stream, f"f/{token}", messages, f"f/{following}")
        if messages:
            add_page(stub, stream, f"f/{following}", [], f"f/{following}")
        token = following
    said = []
    ended = follow(account, JOB, say=said.append, sleep=lambda seconds: None)
    assert ended["TrainingJobStatus"] == "Completed"
    assert f"[algo-1] {LINE}" in said
    assert "[algo-1] the last words" in said
    assert any(line.startswith("--- Training | epoch 10/50") for line in said)


def test_an_interrupt_leaves_the_job_running_and_says_how_to_come_back(account):
    account.stub("sagemaker").add_response("describe_training_job", description())
    account.stub("logs").add_client_error("describe_log_streams", "ResourceNotFoundException")
    said = []

    def interrupt(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(account, JOB, say=said.append, sleep=interrupt)
    assert f"attach {JOB}" in "\n".join(said)
    assert f"stop {JOB}" in "\n".join(said)


# ------------------------------------------------------------------ progress and money


def test_every_metric_definition_finds_its_figure():
    import re

    found = {name: re.search(metric_regex(word), LINE)[1] for name, word in METRICS.items()}
    assert found == {
        "train:loss": "8.1250",
        "val:loss": "7.5000",
        "val:AP": "0.4123",
        "val:AP50": "0.7",
        "val:F1": "0.6512",
        "epoch": "10",
    }
    assert read_figures("Epoch=3 epochs=4 of somebody else") == {}


def test_the_line_of_progress_by_hand():
    """Ten of fifty epochs in 30 minutes on two g5.2xlarge: 0.5 x 2 x 1.515 dollars, and four times as long to go."""
    progress = Progress()
    progress.read(LINE)
    started = NOW - datetime.timedelta(minutes=30)
    assert progress.line(description(TrainingStartTime=started), NOW) == (
        "Training | epoch 10/50 | loss 8.125 | AP 0.412 | F1 0.651 | 30 min | $1.51 so far | about 120 min left"
    )
    assert progress.line(description(), NOW).startswith("Training | epoch 10/50")


def test_what_is_billed_counts_at_the_end():
    job = description("Completed", "Completed", BillableTimeInSeconds=1200, EnableManagedSpotTraining=True)
    assert dollars(job, 1200) == pytest.approx(1200 / 3600 * 2 * 1.515)
    text = summary(job)
    assert "billed for 20 minutes of 2 x ml.g5.2xlarge, about $1.01" in text
    assert f"fetch {JOB}" in text
    failed = summary(description("Failed", "Failed", FailureReason="[algo-2] Image 7 cannot be decoded."))
    assert "reason: [algo-2] Image 7" in failed
    assert f"resume {JOB}" in failed
    assert dollars({"ResourceConfig": {"InstanceType": "ml.odd", "InstanceCount": 1}}, 10) is None


# ------------------------------------------------------------------ jobs


def test_a_job_that_there_is_not(account):
    account.stub("sagemaker").add_client_error(
        "describe_training_job", "ValidationException", "Requested resource not found."
    )
    with pytest.raises(Problem, match="no training job 'other'"):
        describe(account.client("sagemaker"), "other")


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


def test_a_job_that_goes_on_is_the_same_but_for_its_name():
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
