"""The training job: as a readable request, and submitted through the SDK's ModelTrainer."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sagemaker_entry.laptop.account import SDK_MISSING, Account, explained
from sagemaker_entry.laptop.plan import Compute, Limits
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.progress import METRICS, metric_regex

# `exec` replaces the SDK's start script by our entry point, because the script does not forward SIGTERM.
COMMAND = "exec python3 -m sagemaker_entry.train"
CHECKPOINT_PATH = "/opt/ml/checkpoints"
VOLUME_GB = 100  # for instance types without a local disk
LONGEST_BASE = 48  # characters; the SDK appends the time, and AWS allows 63
# Turns off the SDK's telemetry.
SDK_SETTINGS = {
    "SchemaVersion": "1.0",
    "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}},
}


@dataclass(frozen=True)
class JobSpec:
    """A training job, before it has a name.

    Attributes:
        base_name: the beginning of the name; the SDK appends the time.
        image: the container image.
        role: the ARN of the role that the job assumes.
        compute: the instances.
        limits: maximum time and cost.
        channels: input channels, name to S3 address.
        code: the S3 address of the code archive.
        checkpoints: the S3 address that the run folder is synchronised with.
        output: the S3 address of the model.
        tags: cost-allocation and information tags.
        subnets: subnets of a VPC; empty without one.
        security_groups: security groups of a VPC; empty without one.
    """

    base_name: str
    image: str
    role: str
    compute: Compute
    limits: Limits
    channels: Mapping[str, str]
    code: str
    checkpoints: str
    output: str
    tags: Mapping[str, str]
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()

    @property
    def spot(self) -> bool:
        """Whether the job uses spot instances."""
        return self.limits.max_wait is not None


def base_name(config: str, gpus: int) -> str:
    """The beginning of a job's name, made of the configuration's name and the number of GPUs."""
    cleaned = re.sub(r"[^a-zA-Z0-9]+", "-", config).strip("-") or "job"
    return f"dino-{cleaned[: LONGEST_BASE - 12]}-{gpus}gpu".replace("--", "-")


def metric_definitions() -> list[dict[str, str]]:
    """The regular expressions with which SageMaker finds the metrics in the log."""
    return [{"Name": name, "Regex": metric_regex(word)} for name, word in METRICS.items()]


def as_request(spec: JobSpec) -> dict[str, Any]:
    """The job as a CreateTrainingJob request, without the SDK's additions: the time, and channel `sm_drivers`."""
    stopping: dict[str, int] = {"MaxRuntimeInSeconds": spec.limits.max_run}
    if spec.limits.max_wait is not None:
        stopping["MaxWaitTimeInSeconds"] = spec.limits.max_wait
    request: dict[str, Any] = {
        "TrainingJobName": f"{spec.base_name}-<time>",
        "AlgorithmSpecification": {
            "TrainingImage": spec.image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": ["-c", f"<the SDK's start script> ... {COMMAND}"],
            "MetricDefinitions": metric_definitions(),
        },
        "RoleArn": spec.role,
        "InputDataConfig": [_channel(name, uri) for name, uri in {**spec.channels, "code": spec.code}.items()],
        "OutputDataConfig": {"S3OutputPath": spec.output, "CompressionType": "GZIP"},
        "ResourceConfig": {
            "InstanceType": spec.compute.instance_type,
            "InstanceCount": spec.compute.count,
            "VolumeSizeInGB": VOLUME_GB,
        },
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": spec.spot,
        "CheckpointConfig": {"S3Uri": spec.checkpoints, "LocalPath": CHECKPOINT_PATH},
        "RetryStrategy": {"MaximumRetryAttempts": 2},
        "Environment": environment(),
        "Tags": [{"Key": key, "Value": value} for key, value in spec.tags.items()],
    }
    if spec.subnets:
        request["VpcConfig"] = {"Subnets": list(spec.subnets), "SecurityGroupIds": list(spec.security_groups)}
    return request


def environment() -> dict[str, str]:
    """Environment variables of the container; no secrets, since anyone who may describe the job can read them."""
    return {"PYTHONUNBUFFERED": "1"}


def submit(account: Account, spec: JobSpec, bucket: str, prefix: str) -> str:
    """Start the job; returns its name.

    Args:
        account: the job's account.
        spec: the job.
        bucket: the bucket for the SDK's start script.
        prefix: the folder in it.

    Raises:
        Problem: the SDK is not installed, or AWS refused.
    """
    try:
        from sagemaker.core.helper.session_helper import Session
        from sagemaker.core.shapes import MetricDefinition, RetryStrategy
        from sagemaker.core.training import configs
        from sagemaker.train import ModelTrainer
    except ImportError as error:
        raise Problem(f"{SDK_MISSING}.") from error
    with _quiet_sdk(), explained("start the training job (sagemaker:CreateTrainingJob, iam:PassRole)"):
        session = Session(
            boto_session=account.session,
            sagemaker_client=account.client("sagemaker"),
            default_bucket=bucket,
            default_bucket_prefix=prefix,
            sagemaker_config=SDK_SETTINGS,
        )
        networking = None
        if spec.subnets:
            networking = configs.Networking(subnets=list(spec.subnets), security_group_ids=list(spec.security_groups))
        try:
            trainer = ModelTrainer(
                sagemaker_session=session,
                training_image=spec.image,
                role=spec.role,
                base_job_name=spec.base_name,
                source_code=configs.SourceCode(source_dir=spec.code, command=COMMAND),
                compute=configs.Compute(
                    instance_type=spec.compute.instance_type,
                    instance_count=spec.compute.count,
                    volume_size_in_gb=VOLUME_GB,
                    enable_managed_spot_training=spec.spot,
                ),
                stopping_condition=configs.StoppingCondition(
                    max_runtime_in_seconds=spec.limits.max_run, max_wait_time_in_seconds=spec.limits.max_wait
                ),
                networking=networking,
                input_data_config=[_sdk_channel(configs, name, uri) for name, uri in spec.channels.items()],
                output_data_config=configs.OutputDataConfig(s3_output_path=spec.output, compression_type="GZIP"),
                checkpoint_config=configs.CheckpointConfig(s3_uri=spec.checkpoints, local_path=CHECKPOINT_PATH),
                environment=environment(),
                tags=[configs.Tag(key=key, value=value) for key, value in spec.tags.items()],
            )
            trainer.with_metric_definitions(
                [MetricDefinition(name=entry["Name"], regex=entry["Regex"]) for entry in metric_definitions()]
            ).with_retry_strategy(RetryStrategy(maximum_retry_attempts=2))
            trainer.train(wait=False, logs=False)
        except ValueError as error:  # the SDK's own validation
            raise Problem(f"The SageMaker SDK refused the job: {' '.join(str(error).split())}") from error
    name: str = trainer._latest_training_job.training_job_name
    return name


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}


def _sdk_channel(configs: Any, name: str, uri: str) -> Any:
    source = configs.S3DataSource(s3_data_type="S3Prefix", s3_uri=uri, s3_data_distribution_type="FullyReplicated")
    return configs.InputData(channel_name=name, data_source=source)


@contextmanager
def _quiet_sdk() -> Iterator[None]:
    """Turn off the SDK's log messages and its check of the role; `resolve_role` needs fewer permissions for its own."""
    before = os.environ.get("SAGEMAKER_VALIDATE_ROLE")
    os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"
    loggers = [logging.getLogger(name) for name in ("sagemaker", "sagemaker.core", "sagemaker.train", "botocore")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ["SAGEMAKER_VALIDATE_ROLE"]
        else:
            os.environ["SAGEMAKER_VALIDATE_ROLE"] = before
