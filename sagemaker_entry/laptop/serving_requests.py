"""The requests that make endpoints and batch transform jobs of a trained model; nothing here asks AWS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sagemaker_entry.laptop.images import IMAGES

VARIANT = "model"
CODE = "/opt/ml/model/code"
BATCH_VARIABLE = "SAGEMAKER_BATCH"  # as `sagemaker_entry.serve` reads it
GPU_FAMILIES = ("g4dn", "g5", "g6", "g6e", "p4d", "p4de", "p5", "p5e", "p5en")
# Drivers of the hosts: by default they are too old for images of CUDA 13. The second is the newest that transform has.
ENDPOINT_HOST = "al2023-ami-sagemaker-inference-gpu-4-1"  # driver 580
TRANSFORM_HOST = "al2-ami-sagemaker-batch-gpu-535"
SECONDS_TO_START = 900  # for the container to answer /ping; an image of AWS's installs packages first
SERVERLESS_MEMORY = tuple(range(1024, 6144 + 1, 1024))
SERVERLESS_REQUESTS = 5  # at once
MAX_PAYLOAD_MB = 25  # of one image in batch transform
TRANSFORMS_AT_ONCE = 2  # for each instance: one is computed while the next is sent


@dataclass(frozen=True)
class TrainedModel:
    """What a job left.

    Attributes:
        job: its name.
        artifact: the S3 address of model.tar.gz.
        role: the ARN of the role that the job had.
        output: the S3 address that its results lie below.
        vpc: subnets and security groups of the job, if it had any.
        tags: of all that is made to serve it.
        kms_key: the key that encrypts the job's results, if the job was given one.
    """

    job: str
    artifact: str
    role: str
    output: str
    vpc: Mapping[str, Any] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    kms_key: str | None = None


@dataclass(frozen=True)
class Resources:
    """What an endpoint or a transform runs on.

    Attributes:
        instance_type: such as "ml.g5.xlarge".
        count: the number of instances.
        serverless_memory: MB of a serverless endpoint, which has no instances; None for others.
        autoscale: smallest and largest number of instances.
    """

    instance_type: str = "ml.g5.xlarge"
    count: int = 1
    serverless_memory: int | None = None
    autoscale: tuple[int, int] | None = None


def has_gpu(instance_type: str) -> bool:
    """Whether instances of a type have a GPU of NVIDIA's."""
    return instance_type.removeprefix("ml.").partition(".")[0] in GPU_FAMILIES


def for_cpu(image: str) -> str:
    """The image without CUDA that goes with one of AWS's training images."""
    return re.sub(r"-(?:gpu|cu\d+)-", "-cpu-", image)


def is_awss(image: str) -> bool:
    """Whether an image is one of AWS's training images, which have no program named `serve`."""
    known = [f"/{each.repository}:{each.tag}" for each in IMAGES.values()]
    return any(image.endswith(ending) or image.endswith(for_cpu(ending)) for ending in known)


def model_request(name: str, model: TrainedModel, image: str, role: str, *, batch: bool = False) -> dict[str, Any]:
    """The request CreateModel.

    CreateModel takes no entry point: SageMaker starts the image with the word `serve`. AWS's training images hand that
    word to their bash, which learns from the file in BASH_ENV what it means. In batch transform the server is told so:
    there, any status but 200 for one broken image ends the job. SageMaker's SDK sets that variable in its local mode.
    """
    environment = {"PYTHONUNBUFFERED": "1", **({BATCH_VARIABLE: "true"} if batch else {})}
    if is_awss(image):
        environment["BASH_ENV"] = f"{CODE}/serve.sh"
    request: dict[str, Any] = {
        "ModelName": name,
        "PrimaryContainer": {"Image": image, "ModelDataUrl": model.artifact, "Environment": environment},
        "ExecutionRoleArn": role,
        "Tags": _tags(model),
    }
    return request | ({} if model.vpc is None else {"VpcConfig": dict(model.vpc)})


def endpoint_config_request(name: str, model: TrainedModel, model_name: str, resources: Resources) -> dict[str, Any]:
    """The request CreateEndpointConfig."""
    variant: dict[str, Any] = {"VariantName": VARIANT, "ModelName": model_name}
    if resources.serverless_memory is not None:
        variant["ServerlessConfig"] = {
            "MemorySizeInMB": resources.serverless_memory,
            "MaxConcurrency": SERVERLESS_REQUESTS,
        }
    else:
        variant |= {
            "InstanceType": resources.instance_type,
            "InitialInstanceCount": resources.count,
            "InitialVariantWeight": 1.0,
            "ContainerStartupHealthCheckTimeoutInSeconds": SECONDS_TO_START,
        }
        if has_gpu(resources.instance_type):
            variant["InferenceAmiVersion"] = ENDPOINT_HOST
    return {"EndpointConfigName": name, "ProductionVariants": [variant], "Tags": _tags(model)}


def endpoint_request(name: str, model: TrainedModel, config: str) -> dict[str, Any]:
    """The request CreateEndpoint."""
    return {"EndpointName": name, "EndpointConfigName": config, "Tags": _tags(model)}


def transform_request(
    name: str, model_name: str, model: TrainedModel, images: str, output: str, resources: Resources
) -> dict[str, Any]:
    """The request CreateTransformJob: each file below the prefix is one request."""
    machines: dict[str, Any] = {"InstanceType": resources.instance_type, "InstanceCount": resources.count}
    if has_gpu(resources.instance_type):
        machines["TransformAmiVersion"] = TRANSFORM_HOST
    return {
        "TransformJobName": name,
        "ModelName": model_name,
        "MaxConcurrentTransforms": TRANSFORMS_AT_ONCE,
        "MaxPayloadInMB": MAX_PAYLOAD_MB,
        "BatchStrategy": "SingleRecord",
        "TransformInput": {
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": images}},
            "ContentType": "application/x-image",
            "CompressionType": "None",
            "SplitType": "None",
        },
        "TransformOutput": {"S3OutputPath": output, "Accept": "application/json", "AssembleWith": "None"},
        "TransformResources": machines,
        "Tags": _tags(model),
    }


def _tags(model: TrainedModel) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in model.tags.items()]
