"""The jobs of the account, and what is deleted from S3: never what a job uses or could be resumed with."""

import datetime
import json
import re

import pytest

from sagemaker_entry import launch
from sagemaker_entry.laptop.clean import Stored, decide
from sagemaker_entry.laptop.job_list import list_jobs, running_jobs
from sagemaker_entry.protocol.problem import Problem
from tests.sagemaker_entry.stubs import JOB, NOW, add_price, description

BUCKET = "sagemaker-us-east-1-123456789012"
OLD = NOW - datetime.timedelta(days=10)
KERNEL = "kernels/algo-1/triton/K/forward.json"  # compiled by a job; deleted with its checkpoints


def job(name="dino-rooms-2gpu-1", status="Completed", run="r1", dataset="d1", **more):
    channels = {"training": f"datasets/{dataset}/", "code": "code/c1/source.tar.gz", "sm_drivers": "drivers/x1"}
    return {
        **description(status, **more),
        "TrainingJobName": name,
        "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/dino-lightning/runs/{run}/output/"},
        "CheckpointConfig": {"S3Uri": f"s3://{BUCKET}/dino-lightning/runs/{run}/checkpoints/"},
        "InputDataConfig": [
            {"ChannelName": channel, "DataSource": {"S3DataSource": source(place)}}
            for channel, place in channels.items()
        ],
    }


def source(place):
    return {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/dino-lightning/{place}"}


def stored(kind, place, *names, newest=OLD):
    prefix = f"dino-lightning/{place}"
    return Stored(kind, prefix, tuple(prefix + name for name in names or ("x",)), 10, newest)


THERE = [
    stored("datasets", "datasets/d1/", "manifest.json", "shards/1.tar"),
    stored("datasets", "datasets/d2/"),
    stored("code", "code/c1/", "source.tar.gz"),
    stored("drivers", "drivers/x1/"),
    stored("checkpoints", "runs/r1/checkpoints/", "checkpoints/last.ckpt", KERNEL),
    stored("models", "runs/r1/output/", "job/output/model.tar.gz"),
    stored("other", "somebody/else/"),
]


def deleted(jobs, there=THERE, **options):
    plain = {"older_than": 1, "resumable": False, "models": False}
    return [each.prefix for each in decide(there, jobs, BUCKET, NOW, **{**plain, **options}) if each.kept is None]


def place(*names):
    return [f"dino-lightning/{name}/" for name in names]


def test_nothing_that_a_running_job_uses_is_deleted():
    for status in ("InProgress", "Stopping"):
        everything = {"resumable": True, "models": True, "older_than": 0}
        assert deleted([job(status=status)], **everything) == place("datasets/d2")


@pytest.mark.parametrize("status", ["Stopped", "Failed"])
def test_what_a_job_could_be_resumed_with_is_kept_unless_given_up(status):
    assert deleted([job(status=status)]) == place("datasets/d2")
    given_up = place("datasets/d1", "datasets/d2", "code/c1", "drivers/x1", "runs/r1/checkpoints")
    assert deleted([job(status=status)], resumable=True) == given_up


def test_a_job_without_a_checkpoint_cannot_be_resumed_and_needs_nothing():
    there = [each for each in THERE if each.kind != "checkpoints"]
    marker = stored("checkpoints", "runs/r1/checkpoints/", "checkpoints/last.ckpt.sagemaker-uploading", KERNEL)
    assert place("datasets/d1")[0] in deleted([job(status="Failed")], [*there, marker])


def test_a_job_that_another_one_has_completed_is_not_resumed_again():
    jobs = [job("dino-rooms-2gpu-2"), job(status="Stopped")]  # the newest first, of the same checkpoints
    assert place("datasets/d1")[0] in deleted(jobs)
    jobs = [job("dino-rooms-2gpu-2", "Failed"), job(status="Stopped")]
    assert place("datasets/d1")[0] not in deleted(jobs)


def test_models_are_kept_unless_asked_and_never_one_that_is_served():
    model = place("runs/r1/output")[0]
    assert model not in deleted([job()])
    assert model in deleted([job()], models=True)
    served = [f"s3://{BUCKET}/dino-lightning/runs/r1/output/job/output/model.tar.gz"]
    assert model not in deleted([job()], models=True, served=served)


TRIAL_JOB = "dino-trial-rooms-2gpu-20261124100000"
TRIALS = [
    stored("trials", "trials/k1/t1/", "config/job.json", "checkpoints/trial.json"),
    stored("trials", "trials/k1/t2/", "checkpoints/trial.json", newest=OLD + datetime.timedelta(hours=1)),
    stored("trials", "trials/k2/t3/", "output/job/output/model.tar.gz"),  # it has measured nothing
]


def trial_job(name, run, **more):
    place = f"s3://{BUCKET}/dino-lightning/trials/{run}"
    return {
        **job(name, **more),
        "OutputDataConfig": {"S3OutputPath": f"{place}/output/"},
        "CheckpointConfig": {"S3Uri": f"{place}/checkpoints/"},
    }


def test_of_trials_that_measured_the_same_the_newest_is_kept_for_plans():
    assert deleted([], TRIALS) == place("trials/k1/t1", "trials/k2/t3")
    assert deleted([], TRIALS, trials=True) == place("trials/k1/t1", "trials/k1/t2", "trials/k2/t3")


def test_nothing_that_a_running_trial_uses_is_deleted():
    running = trial_job("dino-trial-rooms-2gpu-1", "k2/t3", status="InProgress")
    everything = {"resumable": True, "models": True, "trials": True, "older_than": 0}
    left = deleted([running], [*THERE, *TRIALS], **everything)
    assert left == place("datasets/d2", "runs/r1/checkpoints", "runs/r1/output", "trials/k1/t1", "trials/k1/t2")


def test_nothing_that_anybodys_running_job_reads_is_deleted():
    """A tuning job of any name, jobs that read a whole folder or a file system, and one that writes to the bucket."""
    everything = {"resumable": True, "models": True, "trials": True, "older_than": 0}
    theirs = {**job("tuner-001-abc", status="InProgress"), "CheckpointConfig": None, "OutputDataConfig": {}}
    assert deleted([theirs], **everything) == place("datasets/d2", "runs/r1/checkpoints", "runs/r1/output")
    for folder in ("dino-lightning/datasets", "dino-lightning/", ""):
        channel = {"DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": f"s3://{BUCKET}/{folder}"}}}
        left = deleted([{**theirs, "InputDataConfig": [channel]}], **everything)
        assert place("datasets/d2")[0] not in left and (bool(left) == (folder == "dino-lightning/datasets"))
    system = {"DataSource": {"FileSystemDataSource": {"FileSystemId": "fs-1"}}}
    writes = {"InputDataConfig": [system], "OutputDataConfig": {"S3OutputPath": f"s3://{BUCKET}/"}}
    assert place("datasets/d1")[0] in deleted([{**theirs, **writes}], **everything)


def test_answers_of_transforms_are_kept_with_or_without_their_model():
    there = [THERE[5], stored("answers", "runs/r1/output/transform/t/", "a.png.out")]
    assert deleted([], there, models=True, older_than=0) == place("runs/r1/output")


def test_what_is_new_and_what_is_not_ours_is_kept():
    there = [stored("datasets", "datasets/d9/", newest=NOW - datetime.timedelta(hours=20)), THERE[-1]]
    assert deleted([], there) == []
    assert deleted([], there, older_than=0.5, models=True, resumable=True) == place("datasets/d9")
    assert deleted([job(status="InProgress")], there, older_than=0) == place("datasets/d9")


# ------------------------------------------------------------------ through the command


@pytest.fixture
def filled(aws):
    """A bucket with a dataset, code, a run and a file of somebody else."""
    s3 = aws("s3")
    s3.create_bucket(Bucket=BUCKET)
    for each in THERE:
        for key in each.keys:
            s3.put_object(Bucket=BUCKET, Key=key, Body=b"0123456789")
    return s3


def keys(s3):
    return sorted(entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET).get("Contents", []))


def test_clean_shows_asks_and_deletes_what_no_job_needs(filled, capsys, monkeypatch, calls):
    before = keys(filled)
    arguments = ["clean", "--older-than", "0"]
    assert launch.main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "datasets" in printed and "a model; --models deletes it" in printed
    assert "Dry run: 0.0 MB in 7 objects would be deleted." in printed
    assert launch.main(["clean"]) == 0  # all of it is new
    assert "newer than 1 days" in capsys.readouterr().out
    assert launch.main(arguments) == 1
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert launch.main(arguments) == 1
    assert "Nothing was deleted." in capsys.readouterr().out
    assert keys(filled) == before
    calls.clear()
    assert launch.main([*arguments, "--yes"]) == 0
    assert "Deleted 0.0 MB in 7 objects." in capsys.readouterr().out
    assert keys(filled) == ["dino-lightning/runs/r1/output/job/output/model.tar.gz", "dino-lightning/somebody/else/x"]
    (request,) = [parameters for operation, parameters in calls if operation == "DeleteObjects"]
    sent = [entry["Key"] for entry in request["Delete"]["Objects"]]
    assert sent.index("dino-lightning/datasets/d1/manifest.json") < sent.index(
        "dino-lightning/datasets/d1/shards/1.tar"
    )


def test_clean_knows_trials_and_running_jobs_of_other_names(filled, aws, capsys):
    """A trial that runs, and a job named by somebody else; AWS here completes jobs at once, so it is told otherwise."""
    for each in (*TRIALS, stored("answers", "runs/r1/output/transform/t/", "a.png.out")):
        for key in each.keys:
            filled.put_object(Bucket=BUCKET, Key=key, Body=b"0123456789")
    assert launch.main(["clean", "--older-than", "0", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"trials +1 +.* measured for plans; --trials deletes it", printed)
    assert re.search(r"trials +2 +.* to be deleted", printed)
    assert re.search(r"answers +1 +.* answers of a transform", printed)
    launch.main(["clean", "--older-than", "0", "--yes", "--trials"])
    assert not [key for key in keys(filled) if "/trials/" in key]


def test_the_running_jobs_are_asked_for_whatever_their_names(account):
    stub = account.stub("sagemaker")
    for status, names in (("InProgress", [JOB, "theirs"]), ("Stopping", ["tuner-1"])):
        summaries = [
            {"TrainingJobName": name, "TrainingJobArn": description()["TrainingJobArn"], "CreationTime": NOW,
             "TrainingJobStatus": status} for name in names
        ]  # fmt: skip
        stub.add_response("list_training_jobs", {"TrainingJobSummaries": summaries}, {"StatusEquals": status})
        for name in names:
            stub.add_response("describe_training_job", job(name, status), {"TrainingJobName": name})
    found = [each["TrainingJobName"] for each in running_jobs(account.client("sagemaker"))]
    assert found == [JOB, "theirs", "tuner-1"]


def test_clean_of_an_empty_bucket(aws, capsys):
    aws("s3").create_bucket(Bucket=BUCKET)
    assert launch.main(["clean"]) == 0
    assert "Nothing of this program lies in" in capsys.readouterr().out


def test_where_the_jobs_cannot_be_listed_nothing_is_deleted(account):
    account.stub("sagemaker").add_client_error("list_training_jobs", "AccessDeniedException")
    with pytest.raises(Problem, match="sagemaker:ListTrainingJobs"):
        list_jobs(account, 20)


def test_the_list_of_jobs(account):
    stub = account.stub("sagemaker")
    names = [JOB, "dino-of-somebody-else", TRIAL_JOB, "not-dino-1"]
    summaries = [
        {
            "TrainingJobName": name,
            "TrainingJobArn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{name}",
            "CreationTime": NOW,
            "TrainingJobStatus": "Completed",
        }
        for name in names
    ]
    asked = {"NameContains": "dino-", "SortBy": "CreationTime", "SortOrder": "Descending"}
    stub.add_response("list_training_jobs", {"TrainingJobSummaries": summaries}, asked)
    ended = {"TrainingStartTime": NOW, "BillableTimeInSeconds": 5400}
    last = [
        {"MetricName": name, "Value": value, "Timestamp": NOW}
        for name, value in (("val:AP", 0.4), ("best:AP", 0.5), ("val:F1", 0.6))
    ]
    stub.add_response("describe_training_job", job(JOB, **ended, FinalMetricDataList=last))
    add_price(stub, "4.0000")
    theirs = {**description(), "OutputDataConfig": {"S3OutputPath": "s3://b/theirs/"}}
    stub.add_response("describe_training_job", theirs)
    stub.add_response("describe_training_job", trial_job(TRIAL_JOB, "k1/t1", **ended))
    add_price(stub, "4.0000")
    heads, row, trial, note = list_jobs(account, 20).splitlines()
    assert heads.split() == ["job", "state", "started", "(UTC)", "hours", "cost", "AP", "F1"]
    assert row.split() == [JOB, "Completed", "2026-11-24", "12:00", "1.5", "$6.00", "0.500", "0.600"]
    assert trial.split() == [TRIAL_JOB, "Completed", "2026-11-24", "12:00", "1.5", "$6.00", "-", "-"]
    assert "best of all evaluations" in note


def test_no_jobs(aws, capsys):
    assert launch.main(["list", "--limit", "3"]) == 0
    assert "There are no jobs of this project" in capsys.readouterr().out
    assert launch.main(["list", "--limit", "0"]) == 2
    assert launch.main(["clean", "--older-than", "-1"]) == 2


def test_the_policy_allows_what_is_asked():
    from sagemaker_entry.laptop import clean

    text = (launch.Path(clean.__file__).parents[2] / "docs" / "iam" / "launch.json").read_text()
    allowed = {action for each in json.loads(text)["Statement"] for action in each["Action"]}
    assert {"sagemaker:ListTrainingJobs", "sagemaker:ListModels", "s3:DeleteObject"} <= allowed
    (everywhere,) = (each for each in json.loads(text)["Statement"] if "sagemaker:DescribeModel" in each["Action"])
    assert "sagemaker:DescribeTrainingJob" in everywhere["Action"]  # of running jobs of any name
    assert "arn:aws:sagemaker:REGION:ACCOUNT:training-job/*" in everywhere["Resource"]
