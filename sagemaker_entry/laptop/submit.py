"""The training job: as a readable request, and submitted through the SDK's ModelTrainer."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagemaker_entry.laptop.account import SDK_MISSING, Account, explained
from sagemaker_entry.laptop.compute import Compute
from sagemaker_entry.laptop.dataset_upload import upload_folder
from sagemaker_entry.laptop.plan import Limits
from sagemaker_entry.laptop.quota import no_room
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.progress import METRICS, metric_regex

# `exec` replaces the SDK's start script by our entry point, because the script does not forward SIGTERM.
COMMAND = "exec python3 -m sagemaker_entry.train"
DRIVERS_CHANNEL = "sm_drivers"  # of the SDK: its start script, into which it writes the command
START_SCRIPT = f"/opt/ml/input/data/{DRIVERS_CHANNEL}/sm_train.sh"
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
        drivers: the S3 folder of the SDK's start scripts, once they are uploaded; the SDK makes them itself.
        checkpoints: the S3 address that the run folder is synchronised with.
        output: the S3 address of the model.
        tags: cost-allocation and information tags.
        subnets: subnets of a VPC; empty without one.
        security_groups: security groups of a VPC; empty without one.
        kms_key: id or ARN of the KMS key that encrypts the model and the disk; None for AWS's own keys.
        isolated: whether the containers get no network.
        keep_alive: seconds for which the instances wait for a next job; None to end with this one.
        input_modes: of channels that are not copied to the disk before the job starts.
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
    kms_key: str | None = None
    drivers: str = ""
    isolated: bool = False
    keep_alive: int | None = None
    input_modes: Mapping[str, str] = field(default_factory=dict)

    @property
    def volume_kms_key(self) -> str | None:
        """The key of the disk; None for instances with a disk of their own, which AWS refuses a key for."""
        return None if has_own_disk(self.compute.instance_type) else self.kms_key

    @property
    def spot(self) -> bool:
        """Whether the job uses spot instances."""
        return self.limits.max_wait is not None


def has_own_disk(instance_type: str) -> bool:
    """Whether instances of a type have NVMe disks of their own, which are encrypted by the hardware."""
    family = instance_type.removeprefix("ml.").partition(".")[0]
    return family in ("g5", "g6", "g6e", "g4dn", "p4d", "p4de", "p5", "p5e", "p5en") or family.endswith("d")


def base_name(config: str, gpus: int) -> str:
    """The beginning of a job's name, made of the configuration's name and the number of GPUs."""
    cleaned = re.sub(r"[^a-zA-Z0-9]+", "-", config).strip("-") or "job"
    return f"dino-{cleaned[: LONGEST_BASE - 12]}-{gpus}gpu".replace("--", "-")


def metric_definitions() -> list[dict[str, str]]:
    """The regular expressions with which SageMaker finds the metrics in the log."""
    return [{"Name": name, "Regex": metric_regex(word)} for name, word in METRICS.items()]


def as_request(spec: JobSpec) -> dict[str, Any]:
    """The job as the CreateTrainingJob request that the SDK sends, but for the time in its name."""
    stopping: dict[str, int] = {"MaxRuntimeInSeconds": spec.limits.max_run}
    if spec.limits.max_wait is not None:
        stopping["MaxWaitTimeInSeconds"] = spec.limits.max_wait
    request: dict[str, Any] = {
        "TrainingJobName": f"{spec.base_name}-<time>",
        "AlgorithmSpecification": {
            "TrainingImage": spec.image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["/bin/bash"],
            "ContainerArguments": ["-c", f"chmod +x {START_SCRIPT} && {START_SCRIPT}"],
            "MetricDefinitions": metric_definitions(),
        },
        "RoleArn": spec.role,
        "InputDataConfig": [
            _channel(name, uri, spec.input_modes.get(name, "File"))
            for name, uri in {**spec.channels, "code": spec.code, DRIVERS_CHANNEL: spec.drivers}.items()
        ],
        "OutputDataConfig": {"S3OutputPath": spec.output, "CompressionType": "GZIP"}
        | ({} if spec.kms_key is None else {"KmsKeyId": spec.kms_key}),
        "ResourceConfig": {
            "InstanceType": spec.compute.instance_type,
            "InstanceCount": spec.compute.count,
            "VolumeSizeInGB": VOLUME_GB,
        }
        | ({} if spec.volume_kms_key is None else {"VolumeKmsKeyId": spec.volume_kms_key})
        | ({} if spec.keep_alive is None else {"KeepAlivePeriodInSeconds": spec.keep_alive}),
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": spec.spot,
        "CheckpointConfig": {"S3Uri": spec.checkpoints, "LocalPath": CHECKPOINT_PATH},
        "RetryStrategy": {"MaximumRetryAttempts": 2},
        "Environment": environment(),
        "Tags": [{"Key": key, "Value": value} for key, value in spec.tags.items()],
    }
    if spec.isolated:
        request["EnableNetworkIsolation"] = True
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
        bucket: the bucket for the SDK's start scripts.
        prefix: the folder in it; they get one below it, named by their content.

    Raises:
        Problem: the SDK is not installed, or AWS refused; where it has no quota or no machines, with what would do.
    """
    try:
        return _submit(account, spec, bucket, prefix)
    except Problem as problem:
        advice = no_room(str(problem), spec.compute.instance_type, spec.compute.count, account.region, spot=spec.spot)
        if advice is None:
            raise
        raise Problem(f"{problem} {advice}") from problem


def _submit(account: Account, spec: JobSpec, bucket: str, prefix: str) -> str:
    try:
        from sagemaker.core import shapes
        from sagemaker.core.helper.session_helper import Session
        from sagemaker.core.training import configs
        from sagemaker.train import ModelTrainer
    except ImportError as error:
        raise Problem(f"{SDK_MISSING}.") from error

    class OnceUploaded(Session):  # type: ignore[misc]  # the SDK has no types
        """Sends the start scripts once, where the SDK sends them for every job, with compiled code."""

        def upload_data(self, path: str, *_: Any, **__: Any) -> str:
            return upload_folder(account.client("s3"), Path(path), bucket, prefix, account.id, spec.kms_key)

    with _quiet_sdk(), explained("start the training job (sagemaker:CreateTrainingJob, iam:PassRole)"):
        session = OnceUploaded(
            boto_session=account.session,
            sagemaker_client=account.client("sagemaker"),
            default_bucket=bucket,
            default_bucket_prefix=prefix,
            sagemaker_config=SDK_SETTINGS,
        )
        networking = None
        if spec.subnets or spec.isolated:
            networking = configs.Networking(
                subnets=list(spec.subnets) or None,
                security_group_ids=list(spec.security_groups) or None,
                enable_network_isolation=spec.isolated or None,
            )
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
                    volume_kms_key_id=spec.volume_kms_key,
                    keep_alive_period_in_seconds=spec.keep_alive,
                    enable_managed_spot_training=spec.spot,
                ),
                stopping_condition=configs.StoppingCondition(
                    max_runtime_in_seconds=spec.limits.max_run, max_wait_time_in_seconds=spec.limits.max_wait
                ),
                networking=networking,
                input_data_config=[
                    _sdk_channel(shapes, name, uri, spec.input_modes.get(name, "File"))
                    for name, uri in spec.channels.items()
                ],
                output_data_config=configs.OutputDataConfig(
                    s3_output_path=spec.output, compression_type="GZIP", kms_key_id=spec.kms_key
                ),
                checkpoint_config=configs.CheckpointConfig(s3_uri=spec.checkpoints, local_path=CHECKPOINT_PATH),
                environment=environment(),
                tags=[configs.Tag(key=key, value=value) for key, value in spec.tags.items()],
            )
            trainer.with_metric_definitions(
                [shapes.MetricDefinition(name=entry["Name"], regex=entry["Regex"]) for entry in metric_definitions()]
            ).with_retry_strategy(shapes.RetryStrategy(maximum_retry_attempts=2))
            trainer.train(wait=False, logs=False)
        except ValueError as error:  # the SDK's own validation
            raise Problem(f"The SageMaker SDK refused the job: {' '.join(str(error).split())}") from error
    name: str = trainer._latest_training_job.training_job_name
    return name


def _channel(name: str, uri: str, mode: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": mode}


def _sdk_channel(shapes: Any, name: str, uri: str, mode: str) -> Any:
    source = shapes.S3DataSource(s3_data_type="S3Prefix", s3_uri=uri, s3_data_distribution_type="FullyReplicated")
    return shapes.Channel(channel_name=name, data_source=shapes.DataSource(s3_data_source=source), input_mode=mode)


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
