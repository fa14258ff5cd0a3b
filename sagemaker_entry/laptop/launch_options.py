"""The user's AWS options of `launch`, checked before anything is read or sent."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sagemaker_entry.laptop.tags import user_tags
from sagemaker_entry.protocol.problem import Problem

BUCKET = re.compile(r"[a-z0-9](?:[a-z0-9-]|\.(?!\.)){1,61}[a-z0-9]")
SUBNET, SECURITY_GROUP = re.compile(r"subnet-[0-9a-z]+"), re.compile(r"sg-[0-9a-z]+")
MLFLOW_SERVER = re.compile(
    r"arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:(mlflow-tracking-server/[A-Za-z0-9-]+|mlflow-app/app-[A-Za-z0-9]+)"
)
LONGEST_KEEP_ALIVE = 60  # minutes
KMS_KEY = re.compile(r"[a-zA-Z0-9:/_-]{1,2048}")


@dataclass(frozen=True)
class LaunchOptions:
    """The user's AWS options; None for a default that the plan chooses.

    Attributes:
        gpus: the number of GPUs on all instances together.
        instance_type: such as "ml.g5.2xlarge".
        instance_count: the number of instances.
        role: name or ARN of the role that the job assumes.
        bucket: the S3 bucket for the dataset, the code and the results.
        region: such as "us-east-1".
        profile: a profile of the AWS configuration files.
        image: the container image.
        torch: the PyTorch version of AWS's image, such as "2.10".
        spot: use spot instances.
        trial: run a few dozen steps that are measured, instead of the training.
        max_cost: maximum cost in dollars, on demand.
        max_run_hours: hours after which the job is stopped.
        max_wait_hours: with spot, hours including the wait for instances.
        subnets: subnets of a VPC.
        security_groups: security groups of a VPC.
        kms_key: id or ARN of the KMS key that encrypts what lies in S3 and on the instances.
        network_isolation: the containers get no network; packages go along as wheels.
        tags: the user's tags, as --tags takes them.
        keep_alive: minutes for which the instances wait for a next job.
        input_mode: how the dataset reaches the instances, "File" or "FastFile".
        mlflow: ARN of a tracking server that the job logs to.

    Raises:
        Problem: a value that AWS would refuse after the upload, or two that contradict each other.
    """

    gpus: int | None = None
    instance_type: str | None = None
    instance_count: int | None = None
    role: str | None = None
    bucket: str | None = None
    region: str | None = None
    profile: str | None = None
    image: str | None = None
    torch: str | None = None
    spot: bool = False
    trial: bool = False
    max_cost: float | None = None
    max_run_hours: float | None = None
    max_wait_hours: float | None = None
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    kms_key: str | None = None
    network_isolation: bool = False
    tags: tuple[str, ...] = ()
    keep_alive: int | None = None
    input_mode: str = "File"
    mlflow: str | None = None

    def __post_init__(self) -> None:
        if self.max_wait_hours is not None and not self.spot:
            raise Problem("--max-wait-hours limits the wait for spot instances; add --spot, or leave it out.")
        if bool(self.subnets) != bool(self.security_groups):
            given, other = ("--subnets", "--security-groups") if self.subnets else ("--security-groups", "--subnets")
            raise Problem(f"{given} needs {other} as well: a job in a VPC has both.")
        if self.bucket is not None and (not BUCKET.fullmatch(self.bucket) or "xn--" in self.bucket[:4]):
            raise Problem(
                f"--bucket {self.bucket} is no name of a bucket: 3 to 63 lower-case letters, digits, hyphens and "
                "single dots, a letter or digit at both ends."
            )
        for option, names, form, example in (
            ("--subnets", self.subnets, SUBNET, "subnet-0a1b2c3d"),
            ("--security-groups", self.security_groups, SECURITY_GROUP, "sg-0a1b2c3d"),
        ):
            for name in names:
                if not form.fullmatch(name):
                    raise Problem(f"{option}: {name!r} is no id; ids look like {example}.")
        if self.kms_key is not None and not KMS_KEY.fullmatch(self.kms_key):
            raise Problem(f"--kms-key {self.kms_key!r} is no id, alias or ARN of a KMS key.")
        if self.image is not None and self.torch is not None:
            raise Problem("--torch chooses among AWS's images, and --image names one; give only one of them.")
        user_tags(self.tags)
        if self.keep_alive is not None and not 1 <= self.keep_alive <= LONGEST_KEEP_ALIVE:
            raise Problem(f"--keep-alive is {self.keep_alive} minutes; AWS takes 1 to {LONGEST_KEEP_ALIVE}.")
        if self.keep_alive is not None and self.spot:
            raise Problem("--keep-alive keeps on-demand instances, and --spot takes others; give only one of them.")
        if self.mlflow is not None and not MLFLOW_SERVER.fullmatch(self.mlflow):
            raise Problem(
                f"--mlflow {self.mlflow} is no ARN of a tracking server of SageMaker, such as "
                "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/NAME; others are not reached by a job."
            )
        if self.mlflow is not None and self.network_isolation:
            raise Problem("--mlflow needs a network, and --network-isolation takes it from the job; leave out one.")
