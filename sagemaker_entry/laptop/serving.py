"""Endpoints and batch transform jobs of a trained model: what they cost, making, following and deleting them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from botocore.exceptions import ClientError

from sagemaker_entry.laptop.account import Account, explained
from sagemaker_entry.laptop.follow import describe
from sagemaker_entry.laptop.places import COMMAND
from sagemaker_entry.laptop.preflight import live_price
from sagemaker_entry.laptop.serving_requests import VARIANT, Resources, TrainedModel
from sagemaker_entry.laptop.tags import tags_of_serving
from sagemaker_entry.protocol.instances import INSTANCES, PRICES_DATE
from sagemaker_entry.protocol.problem import Problem

LONGEST_NAME = 63
DOLLARS_PER_GB_SECOND = 0.00002  # of serverless inference in us-east-1, from memory: AWS's own list was not read
REQUESTS_PER_MINUTE = 60  # for each instance, at which autoscaling adds another
PAUSE = 15.0  # seconds between two looks at the state
PRICE_PAGE = "https://aws.amazon.com/sagemaker/pricing/"


def trained_model(account: Account, job: str, tags: Sequence[str] = ()) -> TrainedModel:
    """The model of a job that has ended.

    Args:
        account: the job's account.
        job: the job's name.
        tags: of what serves the model, beside those that the user gave the job; as --tags takes them.

    Raises:
        Problem: there is no such job, it has no model, or AWS would refuse the tags.
    """
    sagemaker = account.client("sagemaker")
    found = describe(sagemaker, job)
    artifact = found.get("ModelArtifacts", {}).get("S3ModelArtifacts")
    status = found["TrainingJobStatus"]
    if status not in ("Completed", "Stopped") or not artifact:
        raise Problem(f"{job} is {status}; it has no model to serve.")
    output = found["OutputDataConfig"]["S3OutputPath"].rstrip("/")
    with explained(f"read the tags of {job} (sagemaker:ListTags)"):
        of_job = sagemaker.list_tags(ResourceArn=found["TrainingJobArn"])["Tags"]
    return TrainedModel(
        job=job,
        artifact=artifact,
        role=found["RoleArn"],
        output=output,
        vpc=found.get("VpcConfig"),
        tags=tags_of_serving(job, of_job, tags),
        kms_key=found["OutputDataConfig"].get("KmsKeyId") or None,
    )


def hourly_price(account: Account, resources: Resources, use: str) -> tuple[float | None, str]:
    """Dollars an hour of all instances, None where it is not known, and where the price is from.

    The table's prices are those of training, which hosting and transforms need not cost: they are told, not used.

    Args:
        account: for the live price.
        resources: the instances.
        use: "Host" for endpoints, "Tsform" for batch transform: AWS's words in its usage types.
    """
    name = resources.instance_type
    price = live_price(account.client("pricing", "us-east-1"), name, account.region, use)
    if price is not None:
        return price * resources.count, f"AWS price list, {account.region}, read just now"
    known = INSTANCES.get(name)
    if known is None or known.price is None:
        return None, f"see {PRICE_PAGE}"
    training = f"${known.price * resources.count:.2f} an hour in {known.region} ({PRICES_DATE})"
    return None, f"training on it costs {training}; with permission for pricing:GetProducts it is read; {PRICE_PAGE}"


def create_endpoint(account: Account, requests: Mapping[str, Mapping[str, Any]]) -> None:
    """Create model, configuration and endpoint; where one is refused, those made before it are deleted.

    Args:
        account: the account.
        requests: `model`, `endpoint_config` and `endpoint`, as the functions above make them.

    Raises:
        Problem: AWS refused.
    """
    sagemaker = account.client("sagemaker")
    with contextlib.ExitStack() as undo, explained("create the endpoint (sagemaker:CreateEndpoint, iam:PassRole)"):
        sagemaker.create_model(**requests["model"])
        name = requests["model"]["ModelName"]
        undo.callback(_quietly, sagemaker.delete_model, ModelName=name)
        sagemaker.create_endpoint_config(**requests["endpoint_config"])
        name = requests["endpoint_config"]["EndpointConfigName"]
        undo.callback(_quietly, sagemaker.delete_endpoint_config, EndpointConfigName=name)
        sagemaker.create_endpoint(**requests["endpoint"])
        undo.pop_all()


def create_transform(account: Account, model: Mapping[str, Any], transform: Mapping[str, Any]) -> None:
    """Create model and transform job; the model is deleted where the job is refused.

    Raises:
        Problem: AWS refused.
    """
    sagemaker = account.client("sagemaker")
    with contextlib.ExitStack() as undo, explained("start the transform (sagemaker:CreateTransformJob, iam:PassRole)"):
        sagemaker.create_model(**model)
        undo.callback(_quietly, sagemaker.delete_model, ModelName=model["ModelName"])
        sagemaker.create_transform_job(**transform)
        undo.pop_all()


def _quietly(call: Callable[..., Any], **arguments: Any) -> None:
    with contextlib.suppress(ClientError):  # the error before it is the one to tell
        call(**arguments)


def scale(account: Account, endpoint: str, smallest: int, largest: int) -> None:
    """Let the number of an endpoint's instances follow its requests.

    Raises:
        Problem: AWS refused.
    """
    scaling = account.client("application-autoscaling")
    target = _scaling_target(endpoint)
    with explained("scale the endpoint (application-autoscaling:RegisterScalableTarget)"):
        scaling.register_scalable_target(**target, MinCapacity=smallest, MaxCapacity=largest)
        scaling.put_scaling_policy(
            **target,
            PolicyName=f"{endpoint}-requests",
            PolicyType="TargetTrackingScaling",
            TargetTrackingScalingPolicyConfiguration={
                "TargetValue": float(REQUESTS_PER_MINUTE),
                "PredefinedMetricSpecification": {
                    "PredefinedMetricType": "SageMakerVariantInvocationsPerInstance",
                },
            },
        )


def _scaling_target(endpoint: str) -> dict[str, str]:
    return {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{endpoint}/variant/{VARIANT}",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }


def wait_for(
    look: Callable[[], dict[str, Any]],
    state: str,
    busy: tuple[str, ...],
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Say the state of something until it changes no more; returns AWS's last description of it.

    Args:
        look: asks AWS for the description.
        state: the name of the state in it.
        busy: the states that will change.
        say: prints a line.
        sleep: waits for some seconds.
    """
    started, shown = time.monotonic(), ""
    while True:
        found = look()
        if found[state] != shown:
            shown = found[state]
            say(f"--- {shown} after {time.monotonic() - started:.0f} s")
        if shown not in busy:
            return found
        sleep(PAUSE)


def look_at_endpoint(account: Account, name: str) -> dict[str, Any]:
    """AWS's description of an endpoint.

    Raises:
        Problem: there is none of that name, or AWS refused.
    """
    return _described(
        "endpoint", name, "sagemaker:DescribeEndpoint", account.client("sagemaker").describe_endpoint, "EndpointName"
    )


def look_at_transform(account: Account, name: str) -> dict[str, Any]:
    """AWS's description of a transform job.

    Raises:
        Problem: there is none of that name, or AWS refused.
    """
    call = account.client("sagemaker").describe_transform_job
    return _described("transform job", name, "sagemaker:DescribeTransformJob", call, "TransformJobName")


def _described(what: str, name: str, action: str, call: Callable[..., Any], argument: str) -> dict[str, Any]:
    try:
        with explained(f"describe the {what} {name} ({action})"):
            found: dict[str, Any] = call(**{argument: name})
    except Problem as problem:
        if "could not find" in str(problem).lower():
            raise Problem(
                f"There is no {what} {name!r} in this account and region; check the name and --region."
            ) from problem
        raise
    return found


def delete_model(account: Account, name: str) -> None:
    """Delete a model of SageMaker's; the archive in S3 stays.

    Raises:
        Problem: AWS refused.
    """
    with explained(f"delete the model {name} (sagemaker:DeleteModel)"):
        account.client("sagemaker").delete_model(ModelName=name)


def parts_of_endpoint(account: Account, name: str) -> tuple[str, list[str]]:
    """The configuration of an endpoint, and its models.

    Raises:
        Problem: there is no such endpoint, or AWS refused.
    """
    config: str = look_at_endpoint(account, name)["EndpointConfigName"]
    with explained(f"describe the configuration {config} (sagemaker:DescribeEndpointConfig)"):
        found = account.client("sagemaker").describe_endpoint_config(EndpointConfigName=config)
    return config, [each["ModelName"] for each in found["ProductionVariants"] if each.get("ModelName")]


def delete_endpoint(account: Account, name: str, config: str, models: list[str]) -> None:
    """Delete an endpoint with its scaling, its configuration and its models.

    Raises:
        Problem: AWS refused; what it names is still there.
    """
    sagemaker, scaling = account.client("sagemaker"), account.client("application-autoscaling")
    target = _scaling_target(name)
    with explained("look for scaling (application-autoscaling:DescribeScalableTargets)"):
        scaled = scaling.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[target["ResourceId"]])
        if scaled["ScalableTargets"]:
            scaling.deregister_scalable_target(**target)
    with explained(f"delete the endpoint {name} (sagemaker:DeleteEndpoint)"):
        sagemaker.delete_endpoint(EndpointName=name)
    with explained(f"delete the configuration {config} (sagemaker:DeleteEndpointConfig)"):
        sagemaker.delete_endpoint_config(EndpointConfigName=config)
    for model in models:
        delete_model(account, model)


def other_buckets(model: TrainedModel, role: str, images: str, output: str) -> str | None:
    """What the role needs in buckets that are not the job's, one sentence for each; None where there are none.

    Args:
        model: the model of the job.
        role: the ARN of the role that the transform has.
        images: the S3 address of the images.
        output: the S3 address of the answers.
    """
    own, name = bucket_of(model.output), role.rpartition("/")[2]
    needed = (("images are read from", images, "s3:GetObject and s3:ListBucket"),
              ("answers are written to", output, "s3:PutObject"))  # fmt: skip
    sentences = [
        f"The {what} the bucket {bucket_of(uri)}, which is not the job's: there, {name} needs {actions}, see "
        "docs/sagemaker.md."
        for what, uri, actions in needed
        if bucket_of(uri) != own
    ]
    return "\n".join(sentences) or None


def bucket_of(uri: str) -> str:
    """The bucket of an S3 address."""
    return uri.removeprefix("s3://").partition("/")[0]


def count_images(account: Account, uri: str) -> int:
    """The number of files below an S3 address.

    Raises:
        Problem: no address of S3, nothing there, or AWS refused.
    """
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.*)", uri)
    if found is None:
        raise Problem(f"{uri!r} is no address of a folder in S3; it looks like s3://bucket/images/.")
    bucket, prefix = found.groups()
    with explained(f"list {uri} (s3:ListBucket)"):
        pages = account.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        count = sum(not entry["Key"].endswith("/") for page in pages for entry in page.get("Contents", ()))
    if count == 0:
        raise Problem(f"There is nothing below {uri}.")
    return count


def example(endpoint: str, region: str) -> str:
    """How to send an image to an endpoint."""
    return (
        f"    import boto3, json\n"
        f'    runtime = boto3.client("sagemaker-runtime", region_name="{region}")\n'
        f'    body = open("plan.png", "rb").read()\n'
        f'    answer = runtime.invoke_endpoint(EndpointName="{endpoint}", ContentType="image/png", Body=body)\n'
        f'    print(json.loads(answer["Body"].read()))\n\n'
        f"Delete it: {COMMAND} delete-endpoint {endpoint}"
    )
