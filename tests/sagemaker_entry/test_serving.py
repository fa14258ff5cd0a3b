"""deploy, transform and delete-endpoint: the requests that AWS would get, and the same server on this machine."""

import io
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dino_lightning.export.package_code import ONNX_RUNTIME
from sagemaker_entry import launch, serve
from sagemaker_entry.laptop import serving, serving_commands, serving_onnx, serving_requests
from sagemaker_entry.laptop.images import IMAGES, image_address
from sagemaker_entry.laptop.serving_requests import Resources, TrainedModel
from sagemaker_entry.laptop.tags import tags_of_serving
from sagemaker_entry.protocol.problem import Problem
from tests.sagemaker_entry.served import Server
from tests.sagemaker_entry.service_model import violations
from tests.sagemaker_entry.stubs import JOB, REGION, StubbedAccount, description

ROLE = "arn:aws:iam::123456789012:role/dino-trainer"
OWN = "123456789012.dkr.ecr.us-east-1.amazonaws.com/dino-serve:1"
MODEL = TrainedModel(
    JOB, "s3://b/runs/model.tar.gz", ROLE, "s3://b/runs", tags=tags_of_serving(JOB, [], ["team=vision"])
)


def test_the_check_of_requests_sees_what_is_wrong():
    request = serving_requests.endpoint_config_request("a_b", MODEL, "m", Resources("ml.none.xlarge"))
    assert len(violations("CreateEndpointConfig", request)) == 2
    tagged = replace(MODEL, tags={"Größe": "10 m²", "a;b": "1"})
    assert len(violations("CreateEndpoint", serving_requests.endpoint_request("e", tagged, "c"))) == 1


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
    model = replace(MODEL, vpc=vpc)
    name = serving_commands._names("dino-" + "x" * 58)
    made = serving_requests.model_request(name, model, image, ROLE)
    assert violations("CreateModel", made) == []
    environment = made["PrimaryContainer"]["Environment"]
    assert ("BASH_ENV" in environment) == (image != OWN)
    assert (
        violations("CreateEndpointConfig", serving_requests.endpoint_config_request(name, model, name, resources)) == []
    )
    assert violations("CreateEndpoint", serving_requests.endpoint_request(name, model, name)) == []
    transform = serving_requests.transform_request(name, name, model, "s3://plans/images/", "s3://b/out/", resources)
    assert violations("CreateTransformJob", transform) == []
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


def add_model(stub, *tags):
    """The answers about a job with a model, and with these tags of the user's beside those of the launcher."""
    stub.add_response("describe_training_job", finished())
    own = [("project", "dino-lightning"), ("run", "r1"), ("dollars-per-hour", "3.0300"), ("aws:x", "1")]
    listed = [{"Key": key, "Value": value} for key, value in (*own, *tags)]
    stub.add_response("list_tags", {"Tags": listed}, {"ResourceArn": finished()["TrainingJobArn"]})


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
    add_model(stub)
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
    assert "1 x ml.g5.xlarge: a price that is not known here (training on it costs $1.41 an hour in us-east-1" in said
    assert "4 of ml.g5.xlarge for endpoint usage, 3 needed" in said
    assert "not tried on AWS" in said
    assert "--- InService after" in said
    assert f'invoke_endpoint(EndpointName="{JOB}"' in said
    account.assert_all_asked()


@pytest.mark.parametrize(
    ("command", "usage", "words"),
    [
        (
            ["deploy", JOB, "--instances", "2"],
            "USE1-Host:ml.g5.xlarge",
            "2 x ml.g5.xlarge: $2.82 an hour until it is deleted",
        ),
        (
            ["deploy", JOB, "--instances", "2", "--autoscale", "1-4"],
            "USE1-Host:ml.g5.xlarge",
            "requests a minute for each: $1.41 to $5.63 an hour until it is deleted",
        ),
        (
            ["transform", JOB, "s3://plans/in/"],
            "USE1-Tsform:ml.g5.xlarge",
            "1 files on 1 x ml.g5.xlarge: $1.41 an hour while",
        ),
    ],
)
def test_the_price_is_that_of_hosting_or_of_transforms_where_aws_tells_it(account, capsys, command, usage, words):
    account._stubs.pop("pricing"), account._clients.pop("pricing")
    product = {"terms": {"OnDemand": {"t": {"priceDimensions": {"d": {"pricePerUnit": {"USD": "1.408"}}}}}}}
    asked = {
        "ServiceCode": "AmazonSageMaker",
        "Filters": [{"Type": "TERM_MATCH", "Field": "usagetype", "Value": usage}],
    }
    account.stub("pricing").add_response("get_products", {"PriceList": [json.dumps(product)]}, asked)
    account.stub("s3").add_response("list_objects_v2", {"Contents": [{"Key": "in/a.png"}]})
    add_model(account.stub("sagemaker"))
    code, (said, errors) = launch.main([*command, "--dry-run"]), capsys.readouterr()
    assert (code, errors) == (0, "")
    assert words in said and "(AWS price list, us-east-1, read just now)" in said
    environment = json.loads(said[said.index("{\n") :])["model"]["PrimaryContainer"]["Environment"]
    assert environment.get("SAGEMAKER_BATCH") == ("true" if command[0] == "transform" else None)
    assert serving_requests.BATCH_VARIABLE == serve.BATCH_VARIABLE


def test_a_dry_run_of_deploy_creates_nothing_and_shows_the_requests(account, capsys):
    add_model(account.stub("sagemaker"))
    assert launch.main(["deploy", JOB, "--dry-run"]) == 0
    said = capsys.readouterr().out
    requests = json.loads(said[said.index("{") :])
    assert requests["endpoint_config"]["ProductionVariants"][0]["InferenceAmiVersion"] == serving_requests.ENDPOINT_HOST
    account.assert_all_asked()


@pytest.mark.parametrize("command", [["deploy", JOB], ["transform", JOB, "s3://plans/images/"]])
def test_the_tags_of_the_job_and_of_the_command_reach_all_that_is_made(account, capsys, command):
    add_model(account.stub("sagemaker"), ("team", "vision"), ("cost-center", "42"))
    account.stub("s3").add_response("list_objects_v2", {"Contents": [{"Key": "images/a.png"}]})
    assert launch.main([*command, "--tags", "stage=test,cost-center=43", "--tags", "Größe=10 m", "--dry-run"]) == 0
    said = capsys.readouterr().out
    requests = json.loads(said[said.index("{\n") :])
    assert set(requests) == {"model", *(["transform"] if "transform" in command else ["endpoint_config", "endpoint"])}
    for request in requests.values():
        assert {tag["Key"]: tag["Value"] for tag in request["Tags"]} == {
            "project": "dino-lightning", "trained-by": JOB, "team": "vision", "cost-center": "43", "stage": "test",
            "Größe": "10 m",
        }  # fmt: skip


def test_more_tags_than_aws_takes_are_refused(account, capsys):
    add_model(account.stub("sagemaker"), *((f"k{number}", "v") for number in range(45)))
    assert launch.main(["deploy", JOB, "--tags", "a=1,b=2,c=3,d=4", "--dry-run"]) == 1
    assert f"with those of {JOB} they are 51 tags; AWS takes 50" in capsys.readouterr().err


def test_what_was_made_is_deleted_where_the_endpoint_is_refused(account, capsys):
    stub = account.stub("sagemaker")
    add_model(stub)
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
    add_model(stub)
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
    add_model(stub)
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
    assert "2 files on 1 x ml.g5.xlarge: a price that is not known here" in said
    assert "s3://b/runs/transform/dino-rooms" in said
    assert (
        "read from the bucket plans, which is not the job's: there, dino-trainer needs s3:GetObject and s3:List" in said
    )
    assert "answers are written" not in said
    account.assert_all_asked()


def test_buckets_that_are_not_the_jobs_are_named():
    assert serving.other_buckets(MODEL, ROLE, "s3://b/images/", "s3://b/out/") is None
    said = serving.other_buckets(MODEL, ROLE, "s3://b/images/", "s3://theirs/out/")
    assert said == (
        "The answers are written to the bucket theirs, which is not the job's: there, dino-trainer needs "
        "s3:PutObject, see docs/sagemaker.md."
    )


def test_the_policy_allows_what_serving_asks_and_is_not_too_long():
    text = (Path(launch.__file__).parents[1] / "docs" / "iam" / "launch.json").read_text()
    policy = json.loads(text)
    allowed = {action for each in policy["Statement"] for action in _listed(each["Action"])}
    assert {
        "sagemaker:AddTags", "sagemaker:ListTags", "iam:CreateServiceLinkedRole", "cloudwatch:PutMetricAlarm",
        "application-autoscaling:RegisterScalableTarget", "s3:PutObject",
    } <= allowed  # fmt: skip
    (linked,) = (each for each in policy["Statement"] if "iam:CreateServiceLinkedRole" in each["Action"])
    assert "application-autoscaling" in linked["Condition"]["StringLike"]["iam:AWSServiceName"]  # and no other role
    filled = text.replace("REGION", "ap-southeast-1").replace("ACCOUNT", "123456789012")
    assert len("".join(filled.split())) <= 6144  # what AWS takes, white space apart


def _listed(value):
    return [value] if isinstance(value, str) else value


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
        (["--memory", "2048"], "--memory is that of --serverless"),
        (["--onnx", "--instance-type", "g5.xlarge"], "--onnx is for CPUs, and ml.g5.xlarge has a GPU"),
        (["--tags", "team"], "'team' is no tag"),
        (["--tags", "trained-by=me"], "trained-by is a tag that launch sets"),
    ],
)
def test_options_that_cannot_be_are_refused_before_aws_is_asked(account, capsys, options, words):
    assert launch.main(["deploy", JOB, "--yes", *options]) == 1
    assert words in capsys.readouterr().err


def test_a_job_without_a_model_has_nothing_to_serve(account):
    account.stub("sagemaker").add_response("describe_training_job", description("Failed", "Failed"))
    with pytest.raises(Problem, match="is Failed; it has no model to serve"):
        serving.trained_model(account, JOB)


# ------------------------------------------------------------------ with ONNX Runtime


def test_a_dry_run_with_onnx_says_what_runs_and_takes_a_cpu(account, capsys):
    add_model(account.stub("sagemaker"))
    assert launch.main(["deploy", JOB, "--onnx", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1 x ml.c6i.xlarge: a price that is not known here (see https://" in said
    assert "ONNX Runtime computes on the CPU, with model.onnx" in said and "onnxruntime is added" in said
    requests = json.loads(said[said.index("{\n") :])
    assert "InferenceAmiVersion" not in requests["endpoint_config"]["ProductionVariants"][0]
    container = requests["model"]["PrimaryContainer"]
    assert container["ModelDataUrl"] == f"s3://b/runs/{JOB}/onnx/<content>/model.tar.gz"
    assert "-cpu-" in container["Image"]


def test_without_the_packages_to_export_with_nothing_is_asked_or_created(account, capsys, monkeypatch):
    add_model(account.stub("sagemaker"))
    monkeypatch.setattr(serving_onnx, "find_spec", lambda name: None if name == "onnxscript" else True)
    assert launch.main(["deploy", JOB, "--onnx", "--yes"]) == 1
    assert "--onnx needs onnxscript: python -m pip install 'dino-lightning[export]'." in capsys.readouterr().err


def archive_of(folder):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(folder, arcname=".")
    return packed.getvalue()


@pytest.mark.slow
def test_a_model_with_onnx_is_uploaded_and_its_server_runs_it(aws, account, model_dir, rooms, tmp_path, capsys):
    """Real archives in a local S3; the rest of the account tells what the test says."""
    s3 = aws("s3")
    s3.create_bucket(Bucket="mine")
    s3.put_object(Bucket="mine", Key="runs/j/model.tar.gz", Body=archive_of(model_dir))
    account._clients["s3"] = s3
    model = replace(MODEL, artifact="s3://mine/runs/j/model.tar.gz", output="s3://mine/runs")
    made = serving_onnx.upload_with_onnx(account, model, print)
    said = capsys.readouterr().out
    assert "model.onnx is exported from model.ckpt on this machine, and compared with it:" in said
    bucket, _, key = made.artifact.removeprefix("s3://").partition("/")
    assert key.startswith(f"runs/{JOB}/onnx/") and key.endswith("/model.tar.gz")
    folder = tmp_path / "model"
    with tarfile.open(fileobj=io.BytesIO(s3.get_object(Bucket=bucket, Key=key)["Body"].read())) as tar:
        tar.extractall(folder, filter="data")
    requirements = (folder / "code" / "requirements.txt").read_text().splitlines()
    before = (model_dir / "code" / "requirements.txt").read_text().splitlines()
    assert requirements == [*before, ONNX_RUNTIME] and not any("onnx" in line for line in before)
    picture = (rooms / "val" / "images" / "000001.png").read_bytes()
    answers = []
    for place in (folder, model_dir):
        with Server(place, CUDA_VISIBLE_DEVICES="").ready() as server:
            answers.append(server.ask(picture))
            which = "ONNX Runtime computes, with model.onnx" if place == folder else "PyTorch computes, with model.ckpt"
            assert f"{which}, on the CPU" in server.log
    (status, onnx), (_, torchs) = answers
    assert status == 200
    found, expected = ({d["name"] for d in each["predictions"][0]["detections"]} for each in (onnx, torchs))
    assert found == expected
    # what was made once is taken as it is
    again = replace(model, artifact=made.artifact)
    assert serving_onnx.upload_with_onnx(account, again, print) == again
    assert "model.onnx is in the model already" in capsys.readouterr().out


def test_what_no_job_has_written_is_not_repacked(tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "model.onnx").touch()
    archive = tmp_path / "model.tar.gz"
    archive.write_bytes(archive_of(tmp_path / "given"))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(Problem, match=r"has no code/requirements\.txt: it was not written by a job"):
        serving_onnx.with_onnx(archive, tmp_path / "scratch", print)


# ------------------------------------------------------------------ on this machine


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["deploy", "--role", "r", "--tags", "a=1"], "With --local, --role and --tags have no effect"),
        (["transform", "plans", "--instances", "2"], "With --local, --instances has no effect"),
        (["deploy", "--port", "0"], ""),
        (["transform", "plans", "--output", "found"], ""),
    ],
)
def test_options_without_effect_here_are_named_once(model_dir, capsys, command, words):
    assert launch.main([command[0], str(model_dir), *command[1:], "--local", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"Dry run: nothing was started. The model is {model_dir}." in said
    assert said.count("no effect") == bool(words) and words in said


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
def test_transform_here_with_onnx_exports_once(model_dir, rooms, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    plans = tmp_path / "plans"
    plans.mkdir()
    shutil.copyfile(rooms / "val" / "images" / "000001.png", plans / "one.png")
    for words in ("exported from model.ckpt on this machine", "is in the model already"):
        assert launch.main(["transform", str(folder), str(plans), "--local", "--onnx"]) == 0
        said = capfd.readouterr().out
        assert words in said and "1 of 1 images answered" in said
        assert (folder / "model.onnx").is_file()


@pytest.mark.slow
def test_deploy_here_serves_the_model_of_a_folder_and_ends_with_the_command(model_dir, rooms):
    command = [sys.executable, "-m", "sagemaker_entry.launch", "deploy", str(model_dir), "--local", "--port", "0"]
    with Server(model_dir, command=command, PYTHONPATH=launch.__file__.rsplit("/", 2)[0]).ready() as server:
        assert server.ask((rooms / "val" / "images" / "000001.png").read_bytes())[0] == 200
        assert server.terminate() == 143
        with pytest.raises(ConnectionRefusedError):  # the server has ended with the command
            server.ask(path="/ping")
