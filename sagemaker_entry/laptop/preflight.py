"""Checks of the AWS account before the upload: role, bucket, quota, price, image; each failure says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from sagemaker_entry.laptop.account import DENIED, SDK_MISSING, Account, error_code, explained
from sagemaker_entry.protocol.instances import INSTANCES, Instance
from sagemaker_entry.protocol.problem import Problem

Warn = Callable[[str], None]


def resolve_role(account: Account, role: str, warn: Warn) -> str:
    """The ARN of the job's role; checks that the role exists and that SageMaker may assume it.

    Raises:
        Problem: no such role, a role of another account, or one that SageMaker may not assume.
    """
    name = role.rpartition("/")[2]
    if role.startswith("arn:"):
        parts = role.split(":")
        if len(parts) != 6 or parts[2] != "iam" or not parts[5].startswith("role/"):
            raise Problem(f"--role: {role} is no ARN of a role; it looks like arn:aws:iam::123456789012:role/NAME.")
        if parts[4] != account.id:
            raise Problem(f"--role: {role} belongs to account {parts[4]}, but the credentials to {account.id}.")
    try:
        found = account.client("iam").get_role(RoleName=name)["Role"]
    except ClientError as error:
        if error_code(error) in DENIED and role.startswith("arn:"):
            warn("The role could not be checked (iam:GetRole is not allowed); SageMaker will reject a wrong one.")
            return role
        if error_code(error) == "NoSuchEntity":
            raise Problem(
                f"--role: account {account.id} has no role {name!r}; docs/sagemaker.md shows how to create one."
            ) from error
        with explained(f"read the role {name} (iam:GetRole)"):
            raise
    trust = found.get("AssumeRolePolicyDocument") or {}
    trust = json.loads(trust) if isinstance(trust, str) else trust
    if "sagemaker.amazonaws.com" not in json.dumps(trust):
        raise Problem(
            f"--role: SageMaker may not assume {name!r}; add sagemaker.amazonaws.com to its trust relationship, as "
            "docs/sagemaker.md shows."
        )
    arn: str = found["Arn"]
    return arn


def check_bucket(account: Account, bucket: str) -> bool:
    """Whether the bucket exists; if it does, it must belong to the account and be in the job's region.

    Raises:
        Problem: it belongs to another account, is not accessible, or is in another region.
    """
    s3 = account.client("s3")
    try:
        answer = s3.head_bucket(Bucket=bucket, ExpectedBucketOwner=account.id)
    except ClientError as error:
        code = error_code(error)
        if code in ("404", "NoSuchBucket"):
            return False
        if code in ("403", *DENIED):
            raise Problem(
                f"Bucket {bucket!r} belongs to another account, or you may not access it; give your own with --bucket."
            ) from error
        if code in ("301", "PermanentRedirect", "400"):
            raise _elsewhere(bucket, "another region", account) from error
        with explained(f"read the bucket {bucket} (s3:ListBucket)"):
            raise
    region = answer.get("BucketRegion") or answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    if region and region != account.region:
        raise _elsewhere(bucket, region, account)
    return True


def _elsewhere(bucket: str, region: str, account: Account) -> Problem:
    return Problem(f"Bucket {bucket!r} is in {region}, the job in {account.region}; give --bucket or --region.")


def make_bucket(account: Account, bucket: str) -> None:
    """Create a bucket without public access, encrypted by default.

    Raises:
        Problem: AWS refused.
    """
    s3 = account.client("s3")
    place = {} if account.region == "us-east-1" else {
        "CreateBucketConfiguration": {"LocationConstraint": account.region}
    }  # fmt: skip
    with explained(f"create the bucket {bucket} (s3:CreateBucket)"):
        s3.create_bucket(Bucket=bucket, **place)
        s3.put_public_access_block(
            Bucket=bucket,
            PublicAccessBlockConfiguration={
                "BlockPublicAcls": True,
                "IgnorePublicAcls": True,
                "BlockPublicPolicy": True,
                "RestrictPublicBuckets": True,
            },
        )
        s3.put_bucket_encryption(
            Bucket=bucket,
            ServerSideEncryptionConfiguration={
                "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]
            },
        )


def check_quota(quotas: Any, instance_type: str, count: int, *, spot: bool, region: str, warn: Warn) -> None:
    """Check that the account may train on this number of instances of a type at once.

    Args:
        quotas: a boto3 client for `service-quotas`.
        instance_type: the job's instance type.
        count: the number of instances.
        spot: whether to check the separate quota of spot instances.
        region: the job's region, for the command that requests a larger quota.
        warn: called with a sentence if the quota could not be checked.

    Raises:
        Problem: the quota is too small.
    """
    name = f"{instance_type} for {'spot ' if spot else ''}training job usage"
    try:
        pages = quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
        found = next((quota for page in pages for quota in page["Quotas"] if quota["QuotaName"] == name), None)
    except (ClientError, BotoCoreError) as error:
        warn(f"The quota could not be checked (servicequotas:ListServiceQuotas: {_reason(error)}).")
        return
    if found is None:
        warn(f"AWS lists no quota {name!r}; a new account may have to request it in the console, under Service Quotas.")
        return
    if found["Value"] < count:
        raise Problem(
            f"Your quota {name!r} is {found['Value']:g}, but {count} are needed; request more (it is free): aws "
            f"service-quotas request-service-quota-increase --service-code sagemaker --quota-code {found['QuotaCode']} "
            f"--desired-value {count} --region {region}"
        )


def live_price(pricing: Any, instance_type: str, region: str) -> float | None:
    """Dollars an hour on demand from AWS's price list; None if the account may not read it or it has no such price.

    Args:
        pricing: a boto3 client for `pricing`, in us-east-1.
        instance_type: the job's instance type.
        region: the job's region.
    """
    if region == "us-east-1":
        fields = {"usagetype": f"USE1-Train:{instance_type}"}
    else:  # there, usage types begin with AWS's own abbreviation of the region, which has no official list
        fields = {"regionCode": region, "instanceName": instance_type, "component": "Training"}
    filters = [{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in fields.items()]
    try:
        answer = pricing.get_products(ServiceCode="AmazonSageMaker", Filters=filters)
    except (ClientError, BotoCoreError):
        return None
    prices = [
        float(dimension["pricePerUnit"]["USD"])
        for product in map(json.loads, answer.get("PriceList", []))
        for term in product["terms"].get("OnDemand", {}).values()
        for dimension in term["priceDimensions"].values()
    ]
    return max((price for price in prices if price > 0), default=None)


def live_instance(ec2: Any, instance_type: str) -> Instance | None:
    """An instance type that the table lacks, from EC2 and with price 0; None if unknown there or without a GPU."""
    try:
        (found,) = ec2.describe_instance_types(InstanceTypes=[instance_type.removeprefix("ml.")])["InstanceTypes"]
    except (ClientError, BotoCoreError, ValueError):
        return None
    gpus = found.get("GpuInfo", {}).get("Gpus", [])
    if not gpus:
        return None
    network = found["NetworkInfo"].get("NetworkCards", [{}])[0].get("BaselineBandwidthInGbps", 5.0)
    return Instance(
        gpus=sum(gpu["Count"] for gpu in gpus),
        gpu=gpus[0]["Name"],
        gpu_memory=round(gpus[0]["MemoryInfo"]["SizeInMiB"] / 1024),
        memory=round(found["MemoryInfo"]["SizeInMiB"] / 1024),
        network=float(network),
        price=0.0,
    )


def resolve_image(region: str, instance_type: str, version: str) -> str:
    """The address of AWS's PyTorch training image.

    Raises:
        Problem: the SDK is not installed, or has no such image.
    """
    try:
        from sagemaker.core import image_uris
    except ImportError as error:
        raise Problem(f"{SDK_MISSING} (or give --image).") from error
    try:
        uri: str = image_uris.retrieve(
            framework="pytorch", version=version, region=region, instance_type=instance_type, image_scope="training"
        )
    except ValueError as error:
        raise Problem(
            f"There is no PyTorch {version} training image for {instance_type} in {region} ({error})."
        ) from error
    return uri


def known_instances(account: Account | None, instance_type: str) -> tuple[dict[str, Instance], str | None]:
    """The table of instance types, with the current price of one of them if the account may read it.

    Returns:
        The table, and the source of the price; None if it is the table's own.
    """
    table = dict(INSTANCES)
    if account is None:
        return table, None
    instance = table.get(instance_type) or live_instance(account.client("ec2"), instance_type)
    if instance is None:
        return table, None
    price = live_price(account.client("pricing", "us-east-1"), instance_type, account.region)
    if price is not None:
        table[instance_type] = replace(instance, price=price, region=account.region)
        return table, f"AWS price list, {account.region}, read just now"
    return table, None


def _reason(error: Exception) -> str:
    """The AWS error code, or the class of an error that did not come from AWS."""
    return error_code(error) if isinstance(error, ClientError) else type(error).__name__
