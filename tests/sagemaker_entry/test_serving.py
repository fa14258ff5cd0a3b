"""deploy, transform and delete-endpoint: the requests that AWS would get, and the same server on this machine."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from botocore.session import get_session
from botocore.validate import ParamValidator
from PIL import Image

from sagemaker_entry import launch
from sagemaker_entry.laptop import serving, serving_commands, serving_requests
from sagemaker_entry.laptop.images import IMAGES, image_address
from sagemaker_entry.laptop.serving_requests import Resources, TrainedModel
from sagemaker_entry.protocol.problem import Problem
from tests.sagemaker_entry.served import Server
from tests.sagemaker_entry.stubs import JOB, REGION, StubbedAccount, description

ROLE = "arn:aws:iam::123456789012:role/dino-trainer"
OWN = "123456789012.dkr.ecr.us-east-1.amazonaws.com/dino-serve:1"
MODEL = TrainedModel(JOB, "s3://b/runs/model.tar.gz", ROLE, "s3://b/runs")
SERVICE = get_session().get_service_model("sagemaker")


def problems(operation, request):
    """What AWS would refuse in a request: wrong types, enums, patterns and lengths."""
    shape = SERVICE.operation_model(operation).input_shape
    report = ParamValidator().validate(request, shape)
    found = [report.generate_report()] if report.has_errors() else []

    def walk(value, shape, place):
        if shape.type_name == "structure":
            for name, part in value.items():
                walk(part, shape.members[name], f"{place}.{name}")
        elif shape.type_name == "list":
            limits = shape.metadata
            if not limits.get("min", 0) <= len(value) <= limits.get("max", 10**9):
                found.append(f"{place}: {len(value)} entries")
            for part in value:
                walk(part, shape.member, place)
        elif shape.type_name == "map":
            for name, part in value.items():
                walk(name, shape.key, place)
                walk(part, shape.value, place)
        elif shape.type_name == "string":
            pattern = shape.metadata.get("pattern", "")
            if pattern and r"\p{" not in pattern and not re.fullmatch(pattern, value):
                found.append(f"{place}: {value!r} is not {pattern}")
            if getattr(shape, "enum", None) and value not in shape.enum:
                found.append(f"{place}: {value!r} is none of {shape.enum}")
            if not shape.metadata.get("min", 0) <= len(value) <= shape.metadata.get("max", 10**9):
                found.append(f"{place}: {len(value)} characters")
        elif shape.type_name in ("integer", "float"):
            limits = shape.metadata
            found.extend([f"{place}: {value}"] * (not limits.get("min", 0) <= value <= limits.get("max", 10**12)))

    walk(request, shape, operation)
    return found


def test_the_check_of_requests_sees_what_is_wrong():
    request = serving_requests.endpoint_config_request("a_b", MODEL, "m", Resources("ml.none.xlarge"))
    assert len(problems("CreateEndpointConfig", request)) == 2


@pytest.mark.parametrize("vpc", [None, {"Subnets": ["subnet-1"], "SecurityGroupIds": ["sg-1"]}])
@pytest.mark.parametrize("image", [OWN, *(image_address(REGION, torch) for torch in IMAGES)])
@pytest.mark.parametrize(
    "resources",
    [
        Resources(),
        Resources("ml.c6i.xlarge", 3),
        Resources("ml.g6.12xlarge", autoscale=(1, 4)),
        *(Resources(serverless_memory=memory) for memory in serving_requests.SERVERLESS_MEMORY),
    ],
)
def test_all_requests_are_such_as_aws_takes(vpc, image, resources):
    model = TrainedModel(JOB, MODEL.artifact, ROLE, MODEL.output, vpc)
    name = serving_commands._names("dino-" + "x" * 58)
    made = serving_requests.model_request(name, model, image, ROLE)
    assert problems("CreateModel", made) == []
    environment = made["PrimaryContainer"]["Environment"]
    assert ("BASH_ENV" in environment) == (image != OWN)
    assert (
        problems("CreateEndpointConfig", serving_requests.endpoint_config_request(name, model, name, resources)) == []
    )
    assert problems("CreateEndpoint", serving_requests.endpoint_request(name, model, name)) == []
    transform = serving_requests.transform_request(name, name, model, "s3://plans/images/", "s3://b/out/", resources)
    assert problems("CreateTransformJob", transform) == []
    assert transform["MaxPayloadInMB"] * transform["MaxConcurrentTransforms"] <= 100  # AWS's rule


def test_aws_has_an_image_without_cuda_beside_each():
    assert serving_requests.for_cpu("pytorch-training:2.10-gpu-py313") == "pytorch-training:2.10-cpu-py313"
    assert serving_requests.for_cpu("pytorch:2.13-cu133-amzn2023-sagemaker") == "pytorch:2.13-cpu-amzn2023-sagemaker"


# ------------------------------------------------------------------ the commands


@pytest.fixture
def account(monkeypatch):
    made = StubbedAccount()
    monkeypatch.setattr("sagemaker_entry.laptop.account.Account", lambda *_: made)
    monkeypatch.setattr(serving, "PAUSE", 0.0)
    made.stub("service-quotas").add_response(
        "list_service_quotas",
        {"Quotas": [{"QuotaName": f"ml.g5.xlarge for {use} usage", "Value": 4, "QuotaCode": "L-1"}
                    for use in ("endpoint", "transform job")]},
    )  # fmt: skip
    made.stub("pricing").add_client_error("get_products", "AccessDeniedException")
    return made


def finished(**more):
    return description(
        "Completed", "Completed", OutputDataConfig={"S3OutputPath": "s3://b/runs/"}, RoleArn=ROLE, **more
    )


def arn(kind, name="x"):
    return f"arn:aws:sagemaker:{REGION}:123456789012:{kind}/{name}"


def of_endpoint(status, **more):
    times = dict.fromkeys(("CreationTime", "LastModifiedTime"), description()["CreationTime"])
    return {
        "EndpointName": JOB, "EndpointArn": arn("endpoint"), "EndpointConfigName": "c", "EndpointStatus": status,
        **times, **more,
    }  # fmt: skip


def test_deploy_says_the_price_creates_waits_and_shows_how_to_ask(account, capsys):
    stub = account.stub("sagemaker")
    stub.add_response("describe_training_job", finished())
    stub.add_response("create_model", {"ModelArn": arn("model")})
    stub.add_response("create_endpoint_config", {"EndpointConfigArn": arn("endpoint-config")})
    stub.add_response("create_endpoint", {"EndpointArn": arn("endpoint")})
    stub.add_response("describe_endpoint", of_endpoint("Creating"))
    stub.add_response("describe_endpoint", of_endpoint("InService"))
    scaling = account.stub("application-autoscaling")
    scaling.add_response("register_scalable_target", {})
    scaling.add_response("put_scaling_policy", {"PolicyARN": "arn"})
    assert launch.main(["deploy", JOB, "--autoscale", "1-3", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "1 x ml.g5.xlarge: $1.41 an hour until it is deleted" in said
    assert "4 of ml.g5.xlarge for endpoint usage, 3 needed" in said
    assert "not tried on AWS" in said
    assert "--- InService after" in said
    assert f'invoke_endpoint(EndpointName="{JOB}"' in said
    account.assert_all_asked()


def test_a_dry_run_of_deploy_creates_nothing_and_shows_the_requests(account, capsys):
    account.stub("sagemaker").add_response("describe_training_job", finished())
    assert launch.main(["deploy", JOB, "--dry-run"]) == 0
    said = capsys.readouterr().out
    requests = json.loads(said[said.index("{") :])
    assert requests["endpoint_config"]["ProductionVariants"][0]["InferenceAmiVersion"] == serving_requests.ENDPOINT_HOST
    account.assert_all_asked()


def test_what_was_made_is_deleted_where_the_endpoint_is_refused(account, capsys):
    stub = account.stub("sagemaker")
    stub.add_response("describe_training_job", finished())
    stub.add_response("create_model", {"ModelArn": arn("model")})
    stub.add_response("create_endpoint_config", {"EndpointConfigArn": arn("endpoint-config")})
    stub.add_client_error("create_endpoint", "ValidationException", "Cannot create already existing endpoint")
    stub.add_response("delete_endpoint_config", {})
    stub.add_response("delete_model", {})
    assert launch.main(["deploy", JOB, "--yes"]) == 1
    assert "already existing endpoint" in capsys.readouterr().err
    account.assert_all_asked()


def test_a_failed_endpoint_says_why_and_how_to_delete_it(account, capsys):
    stub = account.stub("sagemaker")
    stub.add_response("describe_training_job", finished())
    stub.add_response("create_model", {"ModelArn": arn("model")})
    stub.add_response("create_endpoint_config", {"EndpointConfigArn": arn("endpoint-config")})
    stub.add_response("create_endpoint", {"EndpointArn": arn("endpoint")})
    stub.add_response("describe_endpoint", of_endpoint("Failed", FailureReason="The container did not pass the ping."))
    assert launch.main(["deploy", JOB, "--yes"]) == 1
    error = capsys.readouterr().err
    assert "did not pass the ping. The log is /aws/sagemaker/Endpoints/" in error
    assert f"delete-endpoint {JOB}" in error


def test_transform_counts_the_images_waits_and_deletes_its_model(account, capsys):
    stub = account.stub("sagemaker")
    stub.add_response("describe_training_job", finished())
    account.stub("s3").add_response(
        "list_objects_v2", {"Contents": [{"Key": key} for key in ("images/", "images/a.png", "images/b/c.png")]}
    )
    stub.add_response("create_model", {"ModelArn": arn("model")})
    stub.add_response("create_transform_job", {"TransformJobArn": arn("transform-job")})
    state = {
        "TransformJobName": "x", "TransformJobArn": arn("transform-job"), "ModelName": "x", "CreationTime": 0,
        "TransformInput": {"DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": "s3://plans/images/"}}},
        "TransformResources": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1},
    }  # fmt: skip
    for status in ("InProgress", "Completed"):
        stub.add_response("describe_transform_job", {**state, "TransformJobStatus": status})
    stub.add_response("delete_model", {})
    assert launch.main(["transform", JOB, "s3://plans/images/", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "2 files on 1 x ml.g5.xlarge: $1.41 an hour" in said
    assert "s3://b/runs/transform/dino-rooms" in said
    account.assert_all_asked()


def test_delete_endpoint_deletes_what_belongs_to_it_after_a_question(account, capsys, monkeypatch):
    stub = account.stub("sagemaker")
    found = {
        "EndpointConfigName": "c", "EndpointConfigArn": arn("endpoint-config"), "CreationTime": 0,
        "ProductionVariants": [{"VariantName": "model", "ModelName": "m"}],
    }  # fmt: skip
    for _ in range(2):
        stub.add_response("describe_endpoint", of_endpoint("InService"))
        stub.add_response("describe_endpoint_config", found)
    stub.add_response("delete_endpoint", {}, {"EndpointName": JOB})
    stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": "c"})
    stub.add_response("delete_model", {}, {"ModelName": "m"})
    scaling = account.stub("application-autoscaling")
    scaling.add_response("describe_scalable_targets", {"ScalableTargets": []})
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert launch.main(["delete-endpoint", JOB]) == 1
    assert "Nothing was deleted." in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert launch.main(["delete-endpoint", JOB]) == 0
    assert stub.assert_no_pending_responses() is None


def test_an_endpoint_that_is_not_there_is_said(account, capsys):
    account.stub("sagemaker").add_client_error("describe_endpoint", "ValidationException", "Could not find endpoint")
    assert launch.main(["delete-endpoint", "nothing", "--yes"]) == 1
    assert "There is no endpoint 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--serverless"], "--serverless needs --image"),
        (["--serverless", "--image", OWN, "--memory", "5000"], "--memory is 5000"),
        (["--serverless", "--image", OWN, "--instance-type", "g5.xlarge"], "has no instances"),
        (["--autoscale", "0-1"], "inference components only"),
        (["--autoscale", "3-1"], "it looks like 1-4"),
        (["--autoscale", "2-4"], "--instances 1 is not within"),
        (["--instances", "0"], "must be at least 1"),
        (["--endpoint", "a_b"], "is no name"),
    ],
)
def test_options_that_cannot_be_are_refused_before_aws_is_asked(account, capsys, options, words):
    assert launch.main(["deploy", JOB, "--yes", *options]) == 1
    assert words in capsys.readouterr().err


def test_a_job_without_a_model_has_nothing_to_serve(account):
    account.stub("sagemaker").add_response("describe_training_job", description("Failed", "Failed"))
    with pytest.raises(Problem, match="is Failed; it has no model to serve"):
        serving.trained_model(account, JOB)


# ------------------------------------------------------------------ on this machine


@pytest.mark.slow
def test_transform_of_a_folder_here_writes_an_answer_for_each_image(model_dir, rooms, tmp_path, capfd):
    plans = tmp_path / "plans"
    (plans / "more").mkdir(parents=True)
    picture = rooms / "val" / "images" / "000001.png"
    (plans / "more" / "one.png").write_bytes(picture.read_bytes())
    (plans / "broken.png").write_bytes(b"no image")
    assert launch.main(["transform", str(model_dir), str(plans), "--local"]) == 1
    said = capfd.readouterr()
    assert "1 of 2 images answered" in said.out
    assert "broken.png: The image is not an image that can be read" in said.err
    answer = json.loads((tmp_path / "plans-found" / "more" / "one.png.out").read_text())
    with Image.open(picture) as image:
        assert (answer["predictions"][0]["width"], answer["predictions"][0]["height"]) == image.size
    assert launch.main(["deploy", str(plans), "--local"]) == 1
    assert "holds no model.ckpt" in capfd.readouterr().err


@pytest.mark.slow
def test_deploy_here_serves_the_model_of_a_folder_and_ends_with_the_command(model_dir, rooms):
    command = [sys.executable, "-m", "sagemaker_entry.launch", "deploy", str(model_dir), "--local", "--port", "0"]
    with Server(model_dir, command=command, PYTHONPATH=launch.__file__.rsplit("/", 2)[0]).ready() as server:
        assert server.ask((rooms / "val" / "images" / "000001.png").read_bytes())[0] == 200
        assert server.terminate() == 143
        with pytest.raises(ConnectionRefusedError):  # the server has ended with the command
            server.ask(path="/ping")
