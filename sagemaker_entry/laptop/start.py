"""From a checked training to a running job: plan, preflight checks, upload, submission."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

from sagemaker_entry.laptop.account import Account
from sagemaker_entry.laptop.dataset_pack import content_key, read_dataset
from sagemaker_entry.laptop.dataset_upload import AGAIN, upload_bytes, upload_dataset, upload_file
from sagemaker_entry.laptop.follow import PRICE_TAG
from sagemaker_entry.laptop.images import check_address, image_address, image_notes, look_up
from sagemaker_entry.laptop.launch_options import LaunchOptions
from sagemaker_entry.laptop.plan import Compute, Plan, Work, choose_compute, choose_limits, estimate_hours
from sagemaker_entry.laptop.preflight import check_bucket, known_instances, make_bucket, resolve_role
from sagemaker_entry.laptop.quota import check_quota
from sagemaker_entry.laptop.source_archive import build_archive
from sagemaker_entry.laptop.submit import JobSpec, base_name, submit
from sagemaker_entry.laptop.training_config import Training
from sagemaker_entry.protocol.instances import DEFAULT_TYPE, full_type_name
from sagemaker_entry.protocol.job import CONFIG_CHANNEL, CONFIG_FILE, JOB_FILE, WEIGHTS_CHANNEL, Job
from sagemaker_entry.protocol.problem import Problem

PREFIX = "dino-lightning"
DRIVERS = f"{PREFIX}/drivers"  # the SDK's start scripts
Say = Callable[[str], None]


def make_plan(options: LaunchOptions, training: Training, account: Account | None) -> Plan:
    """Choose instances and limits, and estimate time and cost.

    Args:
        options: the user's options.
        training: the training to plan.
        account: for current prices and the bucket's name; None for a plan without an account.

    Raises:
        Problem: options that are impossible or contradict each other.
    """
    name = full_type_name(options.instance_type or DEFAULT_TYPE)
    known, price_source = known_instances(account, name)
    compute = choose_compute(
        gpus=options.gpus, instance_type=name, count=options.instance_count, wanted=training.gpus_wanted, known=known
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
    region = account.region if account else options.region or "us-east-1"
    if compute.instance.region != region:
        compute = _with_foreign_price(compute, region, refuse_cap=account is not None and options.max_cost is not None)
    if options.image is not None:
        check_address(options.image, region)
    image = options.image or image_address(region, options.torch)
    notes = image_notes(image, compute.instance.gpu, datetime.now(timezone.utc).date())
    compute = replace(compute, notes=(*compute.notes, *notes))
    hours = estimate_hours(work, compute)
    limits = choose_limits(
        hours,
        compute,
        max_run_hours=options.max_run_hours,
        max_cost=options.max_cost,
        spot=options.spot,
        max_wait_hours=options.max_wait_hours,
    )
    bucket = bucket_name(options, account.id if account else "<account>", region)
    plan = Plan(
        compute=compute,
        work=work,
        hours=hours,
        limits=limits,
        spot=options.spot,
        image=image,
        places={
            "weights": training.start,
            "dataset": f"s3://{bucket}/{PREFIX}/datasets/<content>/",
            "checkpoints": f"s3://{bucket}/{PREFIX}/runs/<run>/checkpoints/",
            "model": f"s3://{bucket}/{PREFIX}/runs/<run>/output/",
        },
    )
    return plan if price_source is None else replace(plan, price_source=price_source)


def _with_foreign_price(compute: Compute, region: str, *, refuse_cap: bool) -> Compute:
    """The same instances, with a note that the price is of another region.

    Raises:
        Problem: there is a cost cap, which the price of another region cannot guarantee.
    """
    other = compute.instance.region
    if refuse_cap:
        raise Problem(
            f"--max-cost cannot be kept: the price of {compute.instance_type} in {region} could not be read, and that "
            f"of {other} may be lower; allow pricing:GetProducts (docs/sagemaker.md) or give --max-run-hours instead."
        )
    note = (
        f"The price is that of {other}; in {region}, all costs above may differ. With permission for "
        "pricing:GetProducts, the plan uses the right price."
    )
    return replace(compute, notes=(*compute.notes, note))


def run_preflight(options: LaunchOptions, plan: Plan, account: Account) -> tuple[str, dict[str, str]]:
    """Check role, bucket, quota and image before the upload.

    Returns:
        The ARN of the role, and for each of them what was found out, or that it could not be checked.

    Raises:
        Problem: the first check that fails.
    """
    if options.role is None:
        raise Problem(
            "--role is needed: name or ARN of the role that the job assumes; docs/sagemaker.md shows how to create one."
        )
    role, about_role = resolve_role(account, options.role)
    bucket = bucket_name(options, account.id, account.region)
    there = check_bucket(account, bucket)
    quota = check_quota(
        account.client("service-quotas"),
        plan.compute.instance_type,
        plan.compute.count,
        spot=plan.spot,
        region=account.region,
    )
    return role, {
        "account": f"{account.id}, {account.region}",
        "role": about_role,
        "bucket": f"{bucket}, {'yours and in this region' if there else 'will be created'}",
        "quota": quota,
        "image": look_up(account, plan.image),
    }


def planned_job(
    options: LaunchOptions,
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
    """The specification of the job, with all S3 addresses."""
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
        subnets=options.subnets,
        security_groups=options.security_groups,
        kms_key=options.kms_key,
        drivers=f"s3://{bucket}/{DRIVERS}/<content>",
    )


def container_job(training: Training, plan: Plan) -> Job:
    """The job description that the container reads."""
    return Job(
        arguments=training.arguments,
        hosts=plan.compute.count,
        gpus_per_host=plan.compute.instance.gpus,
        weights={option: path.name for option, path in training.weights.items()},
    )


def start(options: LaunchOptions, training: Training, plan: Plan, account: Account, role: str, say: Say) -> str:
    """Upload what is not in S3 yet and submit the job; returns its name.

    Raises:
        Problem: AWS refused.
        KeyboardInterrupt: after saying that nothing was started and that the upload resumes.
    """
    try:
        spec = _uploaded(options, training, plan, account, role, say)
    except KeyboardInterrupt:
        say(f"\nNo job was started. What was sent is kept: {AGAIN}")
        raise
    return submit(account, spec, bucket_name(options, account.id, account.region), DRIVERS)


def _uploaded(options: LaunchOptions, training: Training, plan: Plan, account: Account, role: str, say: Say) -> JobSpec:
    """Upload what is not in S3 yet; returns the job."""
    bucket = bucket_name(options, account.id, account.region)
    if not check_bucket(account, bucket):
        make_bucket(account, bucket, options.kms_key)
        say(f"Created bucket {bucket}: private and encrypted.")
    s3, owner, key = account.client("s3"), account.id, options.kms_key
    dataset = read_dataset(training.data)
    sent = upload_dataset(s3, dataset, bucket, f"{PREFIX}/datasets", owner, key)
    say(
        f"Dataset: {dataset.size / 1e6:,.1f} MB in {len(dataset.manifest.shards)} shards at {sent.uri}, "
        + (f"{sent.bytes_sent / 1e6:,.1f} MB sent." if sent.bytes_sent else "there already, 0 bytes sent.")
    )
    archive = build_archive(training.backbone, training.extras)
    code_key = f"{PREFIX}/code/{content_key(archive)}/source.tar.gz"
    code = upload_bytes(s3, archive, bucket, code_key, owner, key)
    weights = ""
    for path in training.weights.values():
        weights = upload_file(s3, path, bucket, f"{PREFIX}/weights", owner, key)
    now = datetime.now(timezone.utc)
    run = f"{base_name(training.name, plan.compute.gpus)}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    job = container_job(training, plan)
    for name, content in ((CONFIG_FILE, training.config), (JOB_FILE, job.to_json())):
        upload_bytes(s3, content.encode(), bucket, f"{PREFIX}/runs/{run}/config/{name}", owner, key)
    return planned_job(
        options, training, plan, role=role, run=run, dataset=sent.uri, code=code, weights=weights, bucket=bucket
    )


def bucket_name(options: LaunchOptions, account_id: str, region: str) -> str:
    """The user's bucket, or SageMaker's default one, which its usual roles may read."""
    return options.bucket or f"sagemaker-{region}-{account_id}"
