"""A job on the laptop: its log without losing the tail, the line of progress, and how one comes back."""

import datetime

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError, ReadTimeoutError

from sagemaker_entry.laptop.follow import (
    LOG_GROUP,
    Logs,
    Progress,
    describe,
    dollars,
    follow,
    hourly_price,
    summary,
)
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.progress import METRICS, metric_regex, read_metrics
from tests.sagemaker_entry.stubs import JOB, NOW, add_price, description

LINE = (
    "[dino] epoch=10 epochs=50 finished train_loss=8.1250 val_loss=7.5000 val_AP=0.4123 val_AP50=0.7 val_F1=0.6512 "
    "best_AP=0.4200 best_F1=0.6600"
)


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
    assert logs.read() == [
        (1, "algo-1", "first"),
        (3, "algo-2", "third"),
        (5, "algo-1", "fifth"),
        (7, "algo-1", "seventh"),
    ]
    add_streams(stub, one, two)
    add_page(stub, one, "f/3", [(9, "ninth")], "f/4")
    add_page(stub, one, "f/4", [], "f/4")
    add_page(stub, two, "g/1", [], "g/1")
    assert logs.read() == [(9, "algo-1", "ninth")]


def test_a_job_without_a_log_yet(account):
    account.stub("logs").add_client_error("describe_log_streams", "ResourceNotFoundException")
    assert Logs(account.client("logs"), JOB).read() == []


def test_lines_that_arrive_after_the_end_are_shown(account):
    stub, stream = account.stub("logs"), f"{JOB}/algo-1-1"
    jobs_stub = account.stub("sagemaker")
    jobs_stub.add_response("describe_training_job", description(BillableTimeInSeconds=3600))
    add_price(jobs_stub, "3.5000")
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
    assert any(line.startswith("--- Training | epoch 10/50") and "$3.50 so far" in line for line in said)


def test_an_interrupt_leaves_the_job_running_and_says_how_to_come_back(account):
    account.stub("sagemaker").add_response("describe_training_job", description())
    account.stub("sagemaker").add_client_error("list_tags", "AccessDeniedException")
    account.stub("logs").add_client_error("describe_log_streams", "ResourceNotFoundException")
    said = []

    def interrupt(seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(account, JOB, say=said.append, sleep=interrupt)
    assert f"attach {JOB}" in "\n".join(said)
    assert f"stop {JOB}" in "\n".join(said)


class Flaky:
    """A client that fails at some of its calls, and else answers as the one behind it."""

    def __init__(self, client, failures):
        self._client, self._failures = client, failures

    def __getattr__(self, name):
        def call(*args, **parameters):
            failure = next(self._failures.get(name, iter(())), None)
            if failure is not None:
                raise failure
            return getattr(self._client, name)(*args, **parameters)

        return call


def break_network(account, monkeypatch, service, operation, failures):
    flaky = Flaky(account.client(service), {operation: iter(failures)})
    original = account.client
    monkeypatch.setattr(account, "client", lambda name, region=None: flaky if name == service else original(name))


NO_NETWORK = EndpointConnectionError(endpoint_url="https://api.sagemaker")


def test_a_network_that_fails_for_a_while_is_waited_for(account, monkeypatch):
    jobs_stub, stub = account.stub("sagemaker"), account.stub("logs")
    jobs_stub.add_response("describe_training_job", description("Completed", "Completed"))
    add_price(jobs_stub, "3.5000")
    for _ in range(2):
        jobs_stub.add_response("describe_training_job", description("Completed", "Completed"))
    for _ in range(3):
        stub.add_client_error("describe_log_streams", "ResourceNotFoundException")
    timeout = ReadTimeoutError(endpoint_url="https://api.sagemaker")
    break_network(account, monkeypatch, "sagemaker", "describe_training_job", [NO_NETWORK, timeout])
    said, slept = [], []
    assert follow(account, JOB, say=said.append, pause=10, sleep=slept.append)["TrainingJobStatus"] == "Completed"
    assert slept[:2] == [10, 20]
    assert sum("trying again" in line for line in said) == 2


def test_no_line_is_lost_when_the_network_fails_between_two_pages(account, monkeypatch):
    stub, stream = account.stub("logs"), f"{JOB}/algo-1-1"
    add_streams(stub, stream)
    add_page(stub, stream, None, [(1, "first")], "f/1")
    add_streams(stub, stream)
    add_page(stub, stream, "f/1", [(2, "second")], "f/2")
    add_page(stub, stream, "f/2", [], "f/2")
    break_network(account, monkeypatch, "logs", "get_log_events", [None, NO_NETWORK])
    logs = Logs(account.client("logs"), JOB)
    with pytest.raises(EndpointConnectionError):
        logs.read()
    assert logs.read() == [(1, "algo-1", "first"), (2, "algo-1", "second")]


def test_a_network_that_stays_away_ends_in_one_sentence_with_the_way_back(account, monkeypatch):
    break_network(account, monkeypatch, "sagemaker", "describe_training_job", [NO_NETWORK] * 100)
    slept = []
    with pytest.raises(Problem) as caught:
        follow(account, JOB, say=lambda line: None, pause=10, sleep=slept.append)
    assert slept == [10, 20, 40, 80, 160]
    for words in ("cannot be reached", "the job keeps running and costs money", f"attach {JOB}", f"stop {JOB}"):
        assert words in str(caught.value)


def test_missing_credentials_are_not_waited_for(account, monkeypatch):
    break_network(account, monkeypatch, "sagemaker", "describe_training_job", [NoCredentialsError()])
    with pytest.raises(Problem, match="no AWS credentials"):
        follow(account, JOB, say=lambda line: None, sleep=lambda seconds: pytest.fail("waited"))


# ------------------------------------------------------------------ progress and money


def test_every_metric_definition_finds_its_value():
    import re

    found = {name: re.search(metric_regex(word), LINE)[1] for name, word in METRICS.items()}
    assert found == {
        "train:loss": "8.1250",
        "val:loss": "7.5000",
        "val:AP": "0.4123",
        "val:AP50": "0.7",
        "val:F1": "0.6512",
        "best:AP": "0.4200",
        "best:F1": "0.6600",
        "epoch": "10",
    }
    assert read_metrics("Epoch=3 epochs=4 of somebody else") == {}


def test_the_line_of_progress_by_hand():
    """Epochs 2 to 10 of 50 in 27 minutes, so 40 more in 120; 30 minutes of two g5.2xlarge: 0.5 x 2 x 1.515 dollars."""
    progress = Progress()
    progress.read("[dino] epoch=1 epochs=50 finished train_loss=9.0", 0.0)
    assert progress.seconds_left() is None
    progress.read(LINE, 27 * 60.0)
    started = NOW - datetime.timedelta(minutes=30)
    assert progress.line(description(TrainingStartTime=started), NOW) == (
        "Training | epoch 10/50 | loss 8.125 | AP 0.412 | F1 0.651 | 30 min | $1.51 so far | about 120 min left"
    )
    assert progress.line(description(), NOW).startswith("Training | epoch 10/50")
    progress.hourly = 4.0  # as the plan had it
    assert "| $2.00 so far |" in progress.line(description(TrainingStartTime=started), NOW)


def batch(epoch, done, epochs=50, of=100):
    return f"[dino] epoch={epoch} epochs={epochs} batch {done} of {of} train_loss=8.0, 3.1 images/s"


def test_time_left_by_hand():
    progress = Progress()
    progress.read("[dino] 2 processes on 2 hosts", 0.0)
    assert progress.seconds_left() is None
    progress.read(batch(1, 0), 0.0)
    assert progress.seconds_left() is None
    progress.read(batch(1, 10), 6 * 60.0)  # 0.1 of 50 epochs in 6 minutes: 49.9 more in 2994
    assert progress.seconds_left() == pytest.approx(2994 * 60)
    progress.read("[dino] epoch=50 epochs=50 finished train_loss=1.0", 9e5)
    assert progress.seconds_left() is None


def test_time_left_of_a_job_that_was_resumed_counts_only_what_it_did_itself():
    progress = Progress()
    progress.read(batch(41, 20), 300.0)
    progress.read(batch(41, 60), 540.0)  # 0.4 epochs in 4 minutes: 9.4 more in 94
    assert progress.seconds_left() == pytest.approx(94 * 60)
    progress.read(batch(41, 40), 900.0)  # interrupted on spot, and back at a checkpoint
    assert progress.seconds_left() is None
    progress.read(batch(41, 50), 960.0)  # 0.1 epochs a minute
    assert progress.seconds_left() == pytest.approx(95 * 60)


def test_what_is_billed_counts_at_the_end():
    job = description("Completed", "Completed", BillableTimeInSeconds=1200, EnableManagedSpotTraining=True)
    assert dollars(job, 1200) == pytest.approx(1200 / 3600 * 2 * 1.515)
    assert "about $0.50" in summary(job, 1.5)
    text = summary(job)
    assert "billed for 20 minutes of 2 x ml.g5.2xlarge, about $1.01" in text
    assert f"fetch {JOB}" in text
    failed = summary(description("Failed", "Failed", FailureReason="[algo-2] Image 7 cannot be decoded."))
    assert "reason: [algo-2] Image 7" in failed
    assert f"resume {JOB}" in failed
    assert dollars({"ResourceConfig": {"InstanceType": "ml.odd", "InstanceCount": 1}}, 10) is None


def test_the_price_of_the_plan_is_read_where_it_can_be(account):
    stub, client = account.stub("sagemaker"), account.client("sagemaker")
    add_price(stub, "4.2500")
    assert hourly_price(client, description()) == 4.25
    add_price(stub, "a lot")
    assert hourly_price(client, description()) is None
    stub.add_response("list_tags", {"Tags": []})
    assert hourly_price(client, description()) is None
    stub.add_client_error("list_tags", "AccessDeniedException")
    assert hourly_price(client, description()) is None


def test_a_job_that_there_is_not(account):
    account.stub("sagemaker").add_client_error(
        "describe_training_job", "ValidationException", "Requested resource not found."
    )
    with pytest.raises(Problem, match="no training job 'other'"):
        describe(account.client("sagemaker"), "other")
