"""From a checked training to a running job: plan, look at the account, upload, submit."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from sagemaker_entry.laptop.account import Account
from sagemaker_entry.laptop.dataset_pack import content_key, read_dataset
from sagemaker_entry.laptop.dataset_upload import upload_bytes, upload_dataset, upload_file
from sagemaker_entry.laptop.follow import PRICE_TAG
from sagemaker_entry.laptop.plan import Compute, Plan, Work, choose_compute, choose_limits, estimate_hours
from sagemaker_entry.laptop.preflight import (
    check_bucket,
    check_quota,
    known_instances,
    make_bucket,
    resolve_image,
    resolve_role,
)
from sagemaker_entry.laptop.source_archive import build_archive
from sagemaker_entry.laptop.submit import JobSpec, base_name, submit
from sagemaker_entry.laptop.training_config import Training
from sagemaker_entry.protocol.instances import DEFAULT_TYPE, full_type_name
from sagemaker_entry.protocol.job import CONFIG_CHANNEL, CONFIG_FILE, JOB_FILE, WEIGHTS_CHANNEL, Job
from sagemaker_entry.protocol.problem import Problem

PREFIX = "dino-lightning"
IMAGE_VERSION = "2.10"  # of PyTorch: the newest in the SDK's main series of training images
Say = Callable[[str], None]


@dataclass(frozen=True)
class LaunchOptions:
    """What the user asks of AWS; None where it is left to us.

    Attributes:
        gpus: all GPUs together.
        instance_type: such as "ml.g5.2xlarge".
        instance_count: how many.
        role: name or ARN of the role that the job takes on.
        bucket: where everything goes.
        region: such as "us-east-1".
        profile: a profile of the AWS configuration files.
        image: a container image.
        spot: use spot instances.
        max_cost: dollars that must not be passed, on demand.
        max_run_hours: hours after which the job is stopped.
        max_wait_hours: on spot, hours including the waiting.
        subnets: of a VPC.
        security_groups: of a VPC.
    """

    gpus: int | None = None
    instance_type: str | None = None
    instance_count: int | None = None
    role: str | None = None
    bucket: str | None = None
    region: str | None = None
    profile: str | None = None
    image: str | None = None
    spot: bool = False
    max_cost: float | None = None
    max_run_hours: float | None = None
    max_wait_hours: float | None = None
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()


def make_plan(wishes: LaunchOptions, training: Training, account: Account | None) -> Plan:
    """Instances, time and money.

    Args:
        wishes: of the user.
        training: what is trained.
        account: for live prices and names; None for a plan without an account.

    Raises:
        Problem: wishes that cannot be had.
    """
    name = full_type_name(wishes.instance_type or DEFAULT_TYPE)
    known, price_source = known_instances(account, name)
    compute = choose_compute(
        gpus=wishes.gpus, instance_type=name, count=wishes.instance_count, wanted=training.gpus_wanted, known=known
    )
    work = Work(
        train_images=training.train_images,
        val_images=training.val_images,
        epochs=training.epochs,
        evaluations=training.evaluations,
        batch_size=training.batch_size,
        teraflops=training.teraflops,
        parameters=training.parameters,
    )
    region = account.region if account else wishes.region or "us-east-1"
    if compute.instance.region != region:
        compute = _with_foreign_price(compute, region, refuse_cap=account is not None and wishes.max_cost is not None)
    hours = estimate_hours(work, compute)
    limits = choose_limits(
        hours,
        compute,
        max_run_hours=wishes.max_run_hours,
        max_cost=wishes.max_cost,
        spot=wishes.spot,
        max_wait_hours=wishes.max_wait_hours,
    )
    bucket = bucket_name(wishes, account.id if account else "<account>", region)
    plan = Plan(
        compute=compute,
        work=work,
        hours=hours,
        limits=limits,
        spot=wishes.spot,
        image=wishes.image or resolve_image(region, compute.instance_type, IMAGE_VERSION),
        places={
            "dataset": f"s3://{bucket}/{PREFIX}/datasets/<content>/",
            "checkpoints": f"s3://{bucket}/{PREFIX}/runs/<run>/checkpoints/",
            "model": f"s3://{bucket}/{PREFIX}/runs/<run>/output/",
        },
    )
    return plan if price_source is None else replace(plan, price_source=price_source)


def _with_foreign_price(compute: Compute, region: str, *, refuse_cap: bool) -> Compute:
    """The same instances, with a note that their price is that of another region.

    Raises:
        Problem: a cost cap is to be kept, which such a price cannot promise.
    """
    other = compute.instance.region
    if refuse_cap:
        raise Problem(
            f"--max-cost cannot be kept: the price of {compute.instance_type} in {region} could not be read, and that "
            f"of {other} may be lower; allow pricing:GetProducts, as the README shows, or give --max-run-hours instead."
        )
    note = (
        f"The price is that of {other}; in {region}, all the dollars above may be others. With permission for "
        "pricing:GetProducts, the plan has the right ones."
    )
    return replace(compute, notes=(*compute.notes, note))


def run_preflight(wishes: LaunchOptions, plan: Plan, account: Account, warn: Say) -> str:
    """Everything that can go wrong in the account and be known now; returns the ARN of the role.

    Raises:
        Problem: the first thing that is wrong.
    """
    if wishes.role is None:
        raise Problem(
            "--role is needed: name or ARN of the role that the job takes on; the README tells how to make one."
        )
    role = resolve_role(account, wishes.role, warn)
    check_bucket(account, bucket_name(wishes, account.id, account.region))
    check_quota(
        account.client("service-quotas"),
        plan.compute.instance_type,
        plan.compute.count,
        spot=plan.spot,
        region=account.region,
        warn=warn,
    )
    return role


def planned_job(
    wishes: LaunchOptions,
    training: Training,
    plan: Plan,
    *,
    role: str,
    run: str,
    dataset: str,
    code: str,
    weights: str,
    bucket: str,
) -> JobSpec:
    """The job, with all addresses."""
    place = f"s3://{bucket}/{PREFIX}/runs/{run}"
    channels = {"training": dataset, CONFIG_CHANNEL: f"{place}/config/"}
    if training.weights:
        channels[WEIGHTS_CHANNEL] = weights
    return JobSpec(
        base_name=base_name(training.name, plan.compute.gpus),
        image=plan.image,
        role=role,
        compute=plan.compute,
        limits=plan.limits,
        channels=channels,
        code=code,
        checkpoints=f"{place}/checkpoints/",
        output=f"{place}/output/",
        tags={
            "project": "dino-lightning",
            "config": training.name[:100],
            "run": run,
            PRICE_TAG: f"{plan.compute.price:.4f}",
        },
        subnets=wishes.subnets,
        security_groups=wishes.security_groups,
    )


def container_job(training: Training, plan: Plan) -> Job:
    """The plan as the container reads it."""
    return Job(
        arguments=training.arguments,
        hosts=plan.compute.count,
        gpus_per_host=plan.compute.instance.gpus,
        weights={option: path.name for option, path in training.weights.items()},
    )


def start(wishes: LaunchOptions, training: Training, plan: Plan, account: Account, role: str, say: Say) -> str:
    """Upload what is not there yet and submit; returns the name of the job.

    Raises:
        Problem: AWS refused.
    """
    bucket = bucket_name(wishes, account.id, account.region)
    if not check_bucket(account, bucket):
        make_bucket(account, bucket)
        say(f"Made bucket {bucket}: private and encrypted.")
    s3, owner = account.client("s3"), account.id
    dataset = read_dataset(training.data)
    sent = upload_dataset(s3, dataset, bucket, f"{PREFIX}/datasets", owner)
    say(
        f"Dataset: {dataset.size / 1e6:,.1f} MB in {len(dataset.manifest.shards)} shards at {sent.uri}, "
        + (f"{sent.bytes_sent / 1e6:,.1f} MB sent." if sent.bytes_sent else "there already, 0 bytes sent.")
    )
    archive = build_archive()
    code_key = f"{PREFIX}/code/{content_key(archive)}/source.tar.gz"
    code = upload_bytes(s3, archive, bucket, code_key, owner)
    weights = ""
    for path in training.weights.values():
        weights = upload_file(s3, path, bucket, f"{PREFIX}/weights", owner)
    now = datetime.now(timezone.utc)
    run = f"{base_name(training.name, plan.compute.gpus)}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    job = container_job(training, plan)
    for name, content in ((CONFIG_FILE, training.config), (JOB_FILE, job.to_json())):
        upload_bytes(s3, content.encode(), bucket, f"{PREFIX}/runs/{run}/config/{name}", owner)
    spec = planned_job(
        wishes, training, plan, role=role, run=run, dataset=sent.uri, code=code, weights=weights, bucket=bucket
    )
    return submit(account, spec, bucket, f"{PREFIX}/runs/{run}/sdk")


def bucket_name(wishes: LaunchOptions, account_id: str, region: str) -> str:
    """The bucket: the user's, or the one that SageMaker's own tools use, which its usual roles may read."""
    return wishes.bucket or f"sagemaker-{region}-{account_id}"
