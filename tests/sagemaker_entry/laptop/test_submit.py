"""The request of a job: every combination of options has the form that AWS accepts."""

import inspect
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import botocore.session
import pytest

from dino_lightning import DINOModule
from sagemaker_entry.laptop import tags
from sagemaker_entry.laptop.compute import choose_compute
from sagemaker_entry.laptop.disk import NVME_GB, check_disk
from sagemaker_entry.laptop.launch_options import LaunchOptions
from sagemaker_entry.laptop.plan import Limits
from sagemaker_entry.laptop.quota import check_quota
from sagemaker_entry.laptop.submit import JobSpec, as_request
from sagemaker_entry.laptop.tags import user_tags
from sagemaker_entry.protocol.instances import INSTANCES
from sagemaker_entry.protocol.problem import Problem
from tests.sagemaker_entry.service_model import expression, violations

CHANNELS = {"training": "s3://b/d/", "config": "s3://b/c/", "weights": "s3://b/w/", "packages": "s3://b/p"}


def request(**options):
    compute = choose_compute(gpus=None, instance_type=None, count=None, wanted=2)
    limits = Limits(3600, 7200 if options.pop("spot", False) else None, 3.0)
    spec = JobSpec(
        base_name="dino-rooms-2gpu",
        image="763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.10-gpu-py313",
        role="arn:aws:iam::123456789012:role/trainer",
        compute=compute,
        limits=limits,
        channels=CHANNELS,
        code="s3://b/code.tar.gz",
        checkpoints="s3://b/checkpoints/",
        output="s3://b/output/",
        tags={"project": "dino-lightning", **user_tags(["team=vision, cost-center=42"])},
        drivers="s3://b/drivers",
        **options,
    )
    return {**as_request(spec), "TrainingJobName": "dino-rooms-2gpu-20261124120000"}


EXTRAS = [
    {},
    {"subnets": ("subnet-0a1b",), "security_groups": ("sg-0a1b",)},
    {"kms_key": "arn:aws:kms:us-east-1:123456789012:key/0a-1b"},
    {"isolated": True},
    {"keep_alive": 1800},
    {"input_modes": {"training": "FastFile"}},
    {"spot": True},
]


def test_every_pair_of_options_makes_a_request_of_the_right_form():
    for one, other in itertools.combinations_with_replacement(EXTRAS, 2):
        assert violations("CreateTrainingJob", request(**{**one, **other})) == [], (one, other)


def test_the_form_is_really_checked():
    assert violations("CreateTrainingJob", {**request(), "RoleArn": "arn:aws:iam::1:role/trainer-with-a-short-account"})
    assert violations("CreateTrainingJob", {**request(), "TrainingJobName": "x" * 64})
    assert violations("CreateTrainingJob", {**request(), "Tags": [{"Key": "a;b", "Value": "1"}]})
    wrong = request()
    wrong["ResourceConfig"]["InstanceType"] = "ml.g5.3xlarge"
    assert violations("CreateTrainingJob", wrong)
    assert violations("CreateTrainingJob", {**request(), "Surprise": 1})


def test_what_the_options_change_in_the_request():
    plain = request()
    assert "EnableNetworkIsolation" not in plain and "KeepAlivePeriodInSeconds" not in plain["ResourceConfig"]
    changed = request(isolated=True, keep_alive=1800, input_modes={"training": "FastFile"})
    assert changed["EnableNetworkIsolation"] is True
    assert changed["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 1800
    modes = {channel["ChannelName"]: channel["InputMode"] for channel in changed["InputDataConfig"]}
    assert modes.pop("training") == "FastFile" and set(modes.values()) == {"File"}
    assert {"Key": "cost-center", "Value": "42"} in changed["Tags"]


def test_a_warm_pool_has_a_quota_of_its_own(account):
    name = "ml.g5.2xlarge for training warm pool usage"
    quota = {"QuotaName": name, "QuotaCode": "L-1", "Value": 1.0}
    for _ in range(2):
        account.stub("service-quotas").add_response("list_service_quotas", {"Quotas": [quota]})
    where = {"spot": False, "region": "us-east-1", "use": "training warm pool"}
    client = account.client("service-quotas")
    assert check_quota(client, "ml.g5.2xlarge", 1, **where) == f"1 of {name}, 1 needed"
    with pytest.raises(Problem, match=rf"Your quota '{name}' is 1, but 2 are needed; .*--quota-code L-1"):
        check_quota(client, "ml.g5.2xlarge", 2, **where)


# ------------------------------------------------------------------ the disk


@pytest.mark.parametrize(
    ("instance_type", "size", "mode", "words"),
    [
        ("ml.g5.2xlarge", 0.01, "File", "less than 0.1 GB for the dataset, packed and unpacked, of 450 GB"),
        ("ml.g5.2xlarge", 100, "File", "200.0 GB for the dataset, packed and unpacked, of 450 GB"),
        ("ml.g5.2xlarge", 400, "FastFile", "400.0 GB for the dataset, streamed and unpacked, of 450 GB"),
        ("ml.p3.2xlarge", 40, "File", "of 100 GB"),  # a volume
        ("ml.p5.48xlarge", 40, "File", "how large the disk of ml.p5.48xlarge is, is not known here"),
    ],
)
def test_what_a_dataset_takes_on_the_disk(instance_type, size, mode, words):
    assert words in check_disk(instance_type, size, mode)


@pytest.mark.parametrize(
    ("size", "mode", "advice"),
    [
        (400, "File", "add --input-mode FastFile"),
        (445, "File", "choose an instance type with a larger disk"),
        (445, "FastFile", "choose an instance type with a larger disk"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(size, mode, advice):
    with pytest.raises(Problem, match=rf"does not fit on ml.g5.2xlarge: .* on a disk of 450 GB; {advice}"):
        check_disk("ml.g5.2xlarge", size, mode)


def test_disks_gpus_memory_and_network_are_those_of_ec2(aws):
    """Against the answers of EC2 that moto has recorded; without "ml." the types are the same machines."""
    names = sorted({name.removeprefix("ml.") for name in (*INSTANCES, *NVME_GB)})
    found = {
        each["InstanceType"]: each for each in aws("ec2").describe_instance_types(InstanceTypes=names)["InstanceTypes"]
    }
    assert sorted(found) == names
    for name, size in NVME_GB.items():
        assert found[name.removeprefix("ml.")]["InstanceStorageInfo"]["TotalSizeInGB"] == size, name
    for name, instance in INSTANCES.items():
        real = found[name.removeprefix("ml.")]
        (gpu,) = real["GpuInfo"]["Gpus"]
        assert (gpu["Count"], gpu["Name"]) == (instance.gpus, instance.gpu), name
        assert abs(gpu["MemoryInfo"]["SizeInMiB"] * 2**20 / 1e9 - instance.gpu_memory) < 8, (
            name
        )  # GB, or GiB of the A100s
        assert real["MemoryInfo"]["SizeInMiB"] == instance.memory * 1024, name
        cards = [card["BaselineBandwidthInGbps"] for card in real["NetworkInfo"]["NetworkCards"]]
        assert instance.network in (cards[0], sum(cards)), name


# ------------------------------------------------------------------ tuning


def test_the_recipe_of_the_docs_makes_a_tuning_job_of_the_right_form(monkeypatch):
    """The code of docs/own-container.md, word for word, with a described job of every option."""
    page = (Path(tags.__file__).parents[2] / "docs" / "own-container.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    made = []
    job = request(isolated=True, keep_alive=1800, subnets=("subnet-0a1b",), security_groups=("sg-0a1b",))
    client = SimpleNamespace(
        describe_training_job=lambda TrainingJobName: job,
        create_hyper_parameter_tuning_job=lambda **asked: made.append(asked),
    )
    monkeypatch.setattr("boto3.client", lambda service: client)
    exec(compile(code, "own-container.md", "exec"), {})
    (asked,) = made
    assert violations("CreateHyperParameterTuningJob", asked) == []
    definition, config = asked["TrainingJobDefinition"], asked["HyperParameterTuningJobConfig"]
    assert {channel["ChannelName"] for channel in definition["InputDataConfig"]} == set(CHANNELS)
    assert "KeepAlivePeriodInSeconds" not in definition["ResourceConfig"] and definition["EnableNetworkIsolation"]
    objective = config["HyperParameterTuningJobObjective"]["MetricName"]
    assert objective in [metric["Name"] for metric in definition["AlgorithmSpecification"]["MetricDefinitions"]]
    numbers, choices = config["ParameterRanges"].values()
    assert numbers[0] == {"Name": "model.lr", "MinValue": "2e-05", "MaxValue": "0.0005", "ScalingType": "Logarithmic"}
    assert choices == [{"Name": "model.recipe", "Values": ["published", "short"]}]
    for option in (*numbers, *choices):
        assert option["Name"].removeprefix("model.") in inspect.signature(DINOModule.__init__).parameters


# ------------------------------------------------------------------ tags


def test_tags_with_commas_and_repeated():
    assert user_tags(["team=vision,cost-center=42", "owner = a@b.c ", "empty="]) == {
        "team": "vision",
        "cost-center": "42",
        "owner": "a@b.c",
        "empty": "",
    }
    assert user_tags(["Größe=10 m"]) == {"Größe": "10 m"}
    assert user_tags(["a=b=c", "a=b=c"]) == {"a": "b=c"}
    assert user_tags([]) == {}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["team"], "'team' is no tag; write KEY=VALUE"),
        (["=x"], "is no tag"),
        (["a=1,,b=2"], "'' is no tag"),
        (["AWS:team=x"], "begins with aws:"),
        (["run=x"], "run is a tag that launch sets"),
        (["k" * 129 + "=x"], "the key kkkkkkkkkkkkkkkkkkkk... has 129 characters; AWS takes 128"),
        (["k=" + "v" * 257], "the value vvvvvvvvvvvvvvvvvvvv... has 257 characters; AWS takes 256"),
        (["team=a;b"], "the value 'a;b' has ;"),
        (["team=a", "team=b"], "team is given twice, as 'a' and as 'b'"),
        ([f"k{number}=v" for number in range(46)], "46 tags are too many; AWS takes 50"),
    ],
)
def test_tags_that_aws_would_refuse(texts, words):
    with pytest.raises(Problem) as caught:
        LaunchOptions(tags=tuple(texts))
    assert str(caught.value).startswith("--tags: ") and words in str(caught.value)


def test_the_characters_of_tags_are_those_of_awss_pattern():
    """Every character that there is: what is refused here is what AWS refuses, and nothing else is."""
    pattern = botocore.session.get_session().get_service_model("sagemaker").shape_for("TagKey").metadata["pattern"]
    allowed = expression(pattern)
    wrong = [code for code in range(sys.maxunicode + 1) if tags._taken(chr(code)) != bool(allowed.fullmatch(chr(code)))]
    assert wrong == []
    assert allowed.fullmatch("Größe 10 m²") and not allowed.fullmatch("a;b") and not allowed.fullmatch("a\tb")


def test_tags_of_any_script_make_a_request_of_the_right_form():
    given = user_tags(["Größe=10 m²,チーム=視覚,отдел=a.b:c/d=e+f-g@h"])
    sent = {**request(), "Tags": [{"Key": key, "Value": value} for key, value in given.items()]}
    assert violations("CreateTrainingJob", sent) == []
    assert violations("CreateTrainingJob", {**sent, "Tags": [{"Key": "チーム!", "Value": "x"}]})


def test_as_many_tags_as_fit_beside_those_of_a_resumed_job():
    assert len(user_tags([f"k{number}=v" for number in range(45)])) == 45


# ------------------------------------------------------------------ options that do not go together

ARN = "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_alive": 61}, "--keep-alive is 61 minutes; AWS takes 1 to 60"),
        ({"keep_alive": 0}, "--keep-alive is 0 minutes"),
        ({"keep_alive": 5, "spot": True}, "--keep-alive keeps on-demand instances"),
        ({"mlflow": "http://me:5000"}, "--mlflow http://me:5000 is no ARN of a tracking server"),
        ({"mlflow": ARN, "network_isolation": True}, "--mlflow needs a network"),
    ],
)
def test_options_that_aws_would_refuse(options, words):
    with pytest.raises(Problem) as caught:
        LaunchOptions(**options)
    assert words in str(caught.value)


def test_an_arn_of_a_tracking_server_is_taken():
    assert LaunchOptions(mlflow=ARN).mlflow == ARN
