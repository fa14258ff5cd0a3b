"""Checkpoints that stop arriving in S3 are noticed, once, and nothing is said of those that arrive."""

import datetime
import time

import pytest
from botocore.exceptions import EndpointConnectionError

from sagemaker_entry.laptop.checkpoint_watch import CheckpointWatch
from sagemaker_entry.laptop.follow import follow
from tests.sagemaker_entry.stubs import JOB, add_price, description

URI = "s3://bucket/runs/1/checkpoints/"
FINISHED = "[dino] epoch={} epochs=50 finished train_loss=1.0"
BEGAN = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.timezone.utc).timestamp()
MINUTE = 60.0


def listed(stub, arrived, name="last.ckpt"):
    """The next listing: one file that arrived so many minutes after the beginning; None for an empty folder."""
    when = None if arrived is None else datetime.datetime.fromtimestamp(BEGAN + arrived * MINUTE, datetime.timezone.utc)
    content = {} if when is None else {"Contents": [{"Key": f"runs/1/checkpoints/{name}", "LastModified": when}]}
    stub.add_response("list_objects_v2", content, {"Bucket": "bucket", "Prefix": "runs/1/checkpoints/"})


@pytest.fixture
def watch(account):
    return CheckpointWatch(account.client("s3"), URI)


def after(minutes):
    return BEGAN + minutes * MINUTE


def test_checkpoints_that_arrive_are_not_spoken_of(account, watch):
    watch.read(FINISHED.format(1), after(10))
    assert watch.check(after(20)) is None  # too early to say, and S3 is not asked
    listed(account.stub("s3"), 11)
    assert watch.check(after(26)) is None
    assert watch.check(after(40)) is None  # all that was due has arrived, so S3 is not asked again
    watch.read("[dino] epoch=2 epochs=50 batch 3 of 9 train_loss=1.0", after(41))  # no end of an epoch
    assert watch.check(after(90)) is None


def test_a_checkpoint_written_just_before_the_line_counts(account, watch):
    watch.read(FINISHED.format(1), after(10))
    listed(account.stub("s3"), 9)
    assert watch.check(after(26)) is None


def test_a_stall_is_said_once_and_its_end_too(account, watch):
    stub = account.stub("s3")
    watch.read(FINISHED.format(1), after(10))
    listed(stub, 11)
    assert watch.check(after(26)) is None
    watch.read(FINISHED.format(2), after(30))
    listed(stub, 11)
    said = watch.check(after(46))
    assert said.startswith("Since 12:11 UTC no checkpoint has arrived in S3, though an epoch ended at 12:30 UTC")
    assert f"may write to {URI}" in said and "repeats what was trained since then" in said
    assert watch.check(after(46.5)) is None  # S3 is asked once a minute
    watch.read(FINISHED.format(3), after(50))
    listed(stub, 11)
    assert watch.check(after(66)) is None  # said already
    listed(stub, 67)
    assert watch.check(after(68)) == "Checkpoints arrive in S3 again."


@pytest.mark.parametrize(
    ("arrived", "name"),
    [(None, ""), (31, "last.ckpt.sagemaker-uploading"), (31, "metrics.csv"), (31, "kernels/algo-1/triton/K/it.json")],
)
def test_other_files_are_no_checkpoint(account, watch, arrived, name):
    watch.read(FINISHED.format(1), after(10))
    listed(account.stub("s3"), arrived, name)
    said = watch.check(after(40))
    assert said.startswith("No checkpoint has arrived in S3") and "starts from the beginning" in said


def test_who_may_not_look_is_told_once_and_a_failing_network_is_tried_again(account, watch, monkeypatch):
    watch.read(FINISHED.format(1), after(10))
    with monkeypatch.context() as broken:
        broken.setattr(watch, "_newest", lambda: (_ for _ in ()).throw(EndpointConnectionError(endpoint_url="s3")))
        assert watch.check(after(30)) is None
    account.stub("s3").add_client_error("list_objects_v2", "AccessDenied")
    assert (
        watch.check(after(40)) == f"It is not seen whether checkpoints arrive at {URI} (s3:ListBucket: AccessDenied)."
    )
    assert watch.check(after(50)) is None


def test_a_job_without_checkpoints_is_not_watched(account):
    watch = CheckpointWatch(account.client("s3"), "")
    watch.read(FINISHED.format(1), after(10))
    assert watch.check(after(90)) is None


def test_attach_says_it(account):
    jobs, logs = account.stub("sagemaker"), account.stub("logs")
    running = description(CheckpointConfig={"S3Uri": URI})
    ended = int((time.time() - 1800) * 1000)
    stream = f"{JOB}/algo-1-1"
    for answer in (running, *[description("Completed", "Completed")] * 3):
        jobs.add_response("describe_training_job", answer)
        if answer is running:
            add_price(jobs, "3.5000")
        logs.add_response("describe_log_streams", {"logStreams": [{"logStreamName": stream}]})
        events = [{"timestamp": ended, "message": FINISHED.format(1)}] if answer is running else []
        logs.add_response("get_log_events", {"events": events, "nextForwardToken": "f/1"})
        if events:
            logs.add_response("get_log_events", {"events": [], "nextForwardToken": "f/1"})
    listed(account.stub("s3"), None)
    said = []
    follow(account, JOB, say=said.append, sleep=lambda seconds: None)
    assert sum("SageMaker's copying has stalled" in line for line in said) == 1
