"""From a checked training to a running job: plan, preflight checks, upload, submission."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

from dino_lightning.export.package_code import requirements
from sagemaker_entry.laptop.account import Account
from sagemaker_entry.laptop.cheaper import cheaper_choice
from sagemaker_entry.laptop.compute import Compute, choose_compute
from sagemaker_entry.laptop.dataset_pack import content_key, read_dataset
from sagemaker_entry.laptop.dataset_upload import AGAIN, upload_bytes, upload_dataset, upload_file, upload_folder
from sagemaker_entry.laptop.disk import check_disk, dataset_gb
from sagemaker_entry.laptop.estimate import estimate_hours, work_of
from sagemaker_entry.laptop.follow import PRICE_TAG
from sagemaker_entry.laptop.images import check_address, image_address, image_notes, image_python, look_up
from sagemaker_entry.laptop.isolation import check_isolation
from sagemaker_entry.laptop.launch_options import LaunchOptions
from sagemaker_entry.laptop.places import PREFIX, TRIALS
from sagemaker_entry.laptop.plan import Plan, choose_limits
from sagemaker_entry.laptop.preflight import check_bucket, known_instances, make_bucket, resolve_role
from sagemaker_entry.laptop.quota import check_quota
from sagemaker_entry.laptop.source_archive import build_archive
from sagemaker_entry.laptop.submit import JobSpec, base_name, submit
from sagemaker_entry.laptop.tags import tag_value, user_tags
from sagemaker_entry.laptop.training_config import Training
from sagemaker_entry.laptop.trial import (
    TRIAL_HOURS,
    find_measured,
    measured_hours,
    trial_arguments,
    trial_key,
    what_a_trial_runs,
)
from sagemaker_entry.laptop.wheelhouse import wheelhouse
from sagemaker_entry.protocol.instances import DEFAULT_TYPE, full_type_name
from sagemaker_entry.protocol.job import (
    CONFIG_CHANNEL,
    CONFIG_FILE,
    JOB_FILE,
    PACKAGES_CHANNEL,
    WEIGHTS_CHANNEL,
    Job,
)
from sagemaker_entry.protocol.problem import Problem

PACKAGES = f"{PREFIX}/packages"
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
    if options.network_isolation:
        check_isolation(training)
    name = full_type_name(options.instance_type or DEFAULT_TYPE)
    known, price_source = known_instances(account, name)
    compute = choose_compute(
        gpus=options.gpus, instance_type=name, count=options.instance_count, wanted=training.gpus_wanted, known=known
    )
    work = work_of(training)
    if training.length.auto_batch_size is not None and training.length.auto_batch_size < compute.gpus:
        raise Problem(
            f"--auto_batch_size {training.length.auto_batch_size} must be at least {compute.gpus}: each of the "
            f"{compute.gpus} GPUs needs an image in every step."
        )
    region = account.region if account else options.region or "us-east-1"
    if compute.instance.region != region and compute.price is not None:
        compute = _with_foreign_price(compute, region, refuse_cap=account is not None and options.max_cost is not None)
    if options.image is not None:
        check_address(options.image, region)
    image = options.image or image_address(region, options.torch)
    notes = image_notes(image, compute.instance.gpu, datetime.now(timezone.utc).date())
    compute = replace(compute, notes=(*compute.notes, *notes))
    bucket = bucket_name(options, account.id if account else "<account>", region)
    measured = None
    trials = f"{TRIALS}/{trial_key(training, compute, image)}"
    if account is not None:
        measured = find_measured(account.client("s3"), bucket, trials, account.id)
    hours = estimate_hours(work, compute) if measured is None else measured_hours(work, compute.gpus, measured)
    max_run_hours = options.max_run_hours
    if options.trial and max_run_hours is None:
        max_run_hours = TRIAL_HOURS
    waiting = (options.keep_alive or 0) / 60 * (compute.price or 0)  # dollars for instances that wait for a next job
    limits = choose_limits(
        hours,
        compute,
        max_run_hours=max_run_hours,
        max_cost=None if options.max_cost is None else max(0.0, options.max_cost - waiting),
        spot=options.spot,
        max_wait_hours=options.max_wait_hours,
    )
    chosen_by_user = any((options.gpus, options.instance_type, options.instance_count))
    places = {
        "weights": training.start,
        "dataset": f"s3://{bucket}/{PREFIX}/datasets/<content>/",
    }
    if options.trial:
        places["measurements"] = f"s3://{bucket}/{trials}/<run>/"
    else:
        places["checkpoints"] = f"s3://{bucket}/{PREFIX}/runs/<run>/checkpoints/"
        places["model"] = f"s3://{bucket}/{PREFIX}/runs/<run>/output/"
    places |= _more_rows(options, training, compute, image)
    plan = Plan(
        compute=compute,
        work=work,
        hours=hours,
        limits=limits if limits.max_cost is None else replace(limits, max_cost=limits.max_cost + waiting),
        spot=options.spot,
        image=image,
        places=places,
        measured=measured,
        trial=what_a_trial_runs(work, compute.gpus) if options.trial else None,
        cheaper=None if chosen_by_user else cheaper_choice(work, compute, hours[1]),
        kept=options.keep_alive is not None,
    )
    return plan if price_source is None else replace(plan, price_source=price_source)


def _more_rows(options: LaunchOptions, training: Training, compute: Compute, image: str) -> dict[str, str]:
    """Rows of the plan about the disk, and about what the user asked for."""
    rows = {"disk": check_disk(compute.instance_type, dataset_gb(training.data), options.input_mode)}
    if options.keep_alive is not None:
        price = None if compute.price is None else options.keep_alive / 60 * compute.price
        billed = "billed" if price is None else f"billed: ${price:.2f} at most, counted below"
        rows["warm pool"] = (
            f"instances wait {options.keep_alive} minutes for a next job with the same image, type and number, {billed}"
        )
    if options.network_isolation:
        python = image_python(image)
        rows["network"] = "none; " + (
            f"packages go along as wheels for Python {python}" if python else "all packages must be in the image"
        )
    if options.mlflow is not None:
        rows["mlflow"] = options.mlflow
    return rows


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
    if options.keep_alive is not None:
        quota += "; " + check_quota(
            account.client("service-quotas"),
            plan.compute.instance_type,
            plan.compute.count,
            spot=False,
            region=account.region,
            use="training warm pool",
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
    packages: str = "",
) -> JobSpec:
    """The specification of the job, with all S3 addresses."""
    place = f"s3://{bucket}/{folder_of_run(training, plan, run)}"
    channels = {"training": dataset, CONFIG_CHANNEL: f"{place}/config/"}
    if training.weights:
        channels[WEIGHTS_CHANNEL] = weights
    if options.network_isolation and image_python(plan.image) is not None:
        channels[PACKAGES_CHANNEL] = packages or f"s3://{bucket}/{PACKAGES}/<content>"
    return JobSpec(
        base_name=base_name(job_title(training, plan), plan.compute.gpus),
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
            "config": tag_value(training.name),
            "run": run,
            **({} if plan.compute.price is None else {PRICE_TAG: f"{plan.compute.price:.4f}"}),
            **user_tags(options.tags),
        },
        subnets=options.subnets,
        security_groups=options.security_groups,
        kms_key=options.kms_key,
        drivers=f"s3://{bucket}/{DRIVERS}/<content>",
        isolated=options.network_isolation,
        keep_alive=None if options.keep_alive is None else options.keep_alive * 60,
        input_modes={"training": options.input_mode},
    )


def folder_of_run(training: Training, plan: Plan, run: str) -> str:
    """The key that all files of a run begin with; a trial lies where the next plan looks for measurements."""
    if plan.trial is None:
        return f"{PREFIX}/runs/{run}"
    return f"{TRIALS}/{trial_key(training, plan.compute, plan.image)}/{run}"


def job_title(training: Training, plan: Plan) -> str:
    """What the names of jobs are made from."""
    return training.name if plan.trial is None else f"trial-{training.name}"


def container_job(options: LaunchOptions, training: Training, plan: Plan) -> Job:
    """The job description that the container reads."""
    arguments = training.arguments if plan.trial is None else trial_arguments(training)
    return Job(
        arguments=(*arguments, *([] if options.mlflow is None else [f"--mlflow={options.mlflow}"])),
        trial=plan.trial is not None,
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
    extras = (*training.extras, *([] if options.mlflow is None else ["mlflow"]))
    python = image_python(plan.image) if options.network_isolation else None
    packages = ""
    if python is not None:
        say(f"Packages for Python {python}, as wheels: downloaded here once, then uploaded once.")
        wheels = wheelhouse(requirements(training.backbone, extras), python)
        packages = upload_folder(s3, wheels, bucket, PACKAGES, owner, key)
    archive = build_archive(training.backbone, extras)
    code_key = f"{PREFIX}/code/{content_key(archive)}/source.tar.gz"
    code = upload_bytes(s3, archive, bucket, code_key, owner, key)
    weights = ""
    for path in training.weights.values():
        weights = upload_file(s3, path, bucket, f"{PREFIX}/weights", owner, key)
    now = datetime.now(timezone.utc)
    run = f"{base_name(job_title(training, plan), plan.compute.gpus)}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    job = container_job(options, training, plan)
    for name, content in ((CONFIG_FILE, training.config), (JOB_FILE, job.to_json())):
        upload_bytes(s3, content.encode(), bucket, f"{folder_of_run(training, plan, run)}/config/{name}", owner, key)
    return planned_job(
        options,
        training,
        plan,
        role=role,
        run=run,
        dataset=sent.uri,
        code=code,
        weights=weights,
        bucket=bucket,
        packages=packages,
    )


def bucket_name(options: LaunchOptions, account_id: str, region: str) -> str:
    """The user's bucket, or SageMaker's default one, which its usual roles may read."""
    return options.bucket or f"sagemaker-{region}-{account_id}"
