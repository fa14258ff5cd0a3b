"""What may go wrong in the account, found out before the upload: each failure one sentence with the way out."""

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
    """The ARN of the role that the job takes on; checks that it exists and that SageMaker may take it on.

    Raises:
        Problem: no such role, of another account, or SageMaker may not take it on.
    """
    name = role.rpartition("/")[2]
    if role.startswith("arn:"):
        parts = role.split(":")
        if len(parts) != 6 or parts[2] != "iam" or not parts[5].startswith("role/"):
            raise Problem(f"--role: {role} is no ARN of a role; it looks like arn:aws:iam::123456789012:role/NAME.")
        if parts[4] != account.id:
            raise Problem(f"--role: {role} belongs to account {parts[4]}, but the credentials are of {account.id}.")
    try:
        found = account.client("iam").get_role(RoleName=name)["Role"]
    except ClientError as error:
        if error_code(error) in DENIED and role.startswith("arn:"):
            warn("The role could not be looked at (iam:GetRole is not allowed); SageMaker will say if it is wrong.")
            return role
        if error_code(error) == "NoSuchEntity":
            raise Problem(
                f"--role: account {account.id} has no role {name!r}; the README tells how to make one."
            ) from error
        with explained(f"look at the role {name} (iam:GetRole)"):
            raise
    trust = found.get("AssumeRolePolicyDocument") or {}
    trust = json.loads(trust) if isinstance(trust, str) else trust
    if "sagemaker.amazonaws.com" not in json.dumps(trust):
        raise Problem(
            f"--role: SageMaker may not take on {name!r}; add sagemaker.amazonaws.com to its trust relationship, as "
            "the README shows."
        )
    arn: str = found["Arn"]
    return arn


def check_bucket(account: Account, bucket: str) -> bool:
    """Whether the bucket exists; it must be ours and in the right region.

    Raises:
        Problem: it is another account's, out of reach, or in another region.
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
                f"Bucket {bucket!r} belongs to another account, or you may not use it; give your own with --bucket."
            ) from error
        if code in ("301", "PermanentRedirect", "400"):
            raise _elsewhere(bucket, "another region", account) from error
        with explained(f"look at bucket {bucket} (s3:ListBucket)"):
            raise
    region = answer.get("BucketRegion") or answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    if region and region != account.region:
        raise _elsewhere(bucket, region, account)
    return True


def _elsewhere(bucket: str, region: str, account: Account) -> Problem:
    return Problem(f"Bucket {bucket!r} is in {region}, the job in {account.region}; give --bucket or --region.")


def make_bucket(account: Account, bucket: str) -> None:
    """A new bucket: nothing in it is public, everything encrypted.

    Raises:
        Problem: AWS refused.
    """
    s3 = account.client("s3")
    place = {} if account.region == "us-east-1" else {
        "CreateBucketConfiguration": {"LocationConstraint": account.region}
    }  # fmt: skip
    with explained(f"make the bucket {bucket} (s3:CreateBucket)"):
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
    """Whether the account may train on so many instances of this type at once.

    Args:
        quotas: a boto3 client for `service-quotas`.
        instance_type: of the job.
        count: how many.
        spot: spot instances have a quota of their own.
        region: for the command that asks for more.
        warn: takes what could not be checked.

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
        warn(f"AWS lists no quota {name!r}; a new account may have to ask for it in the console, under Service Quotas.")
        return
    if found["Value"] < count:
        raise Problem(
            f"Your quota {name!r} is {found['Value']:g}, but {count} are needed; ask for more (it is free): aws "
            f"service-quotas request-service-quota-increase --service-code sagemaker --quota-code {found['QuotaCode']} "
            f"--desired-value {count} --region {region}"
        )


def live_price(pricing: Any, instance_type: str, region: str) -> float | None:
    """Dollars an hour on demand, from AWS's price list; None where the account may not ask or the list has none.

    Args:
        pricing: a boto3 client for `pricing`, in us-east-1.
        instance_type: of the job.
        region: of the job.
    """
    if region == "us-east-1":
        fields = {"usagetype": f"USE1-Train:{instance_type}"}
    else:  # there, a usage type abbreviates the region in AWS's own way, which no list gives
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
    """An instance type that our table lacks, as EC2 describes it; its price is 0, to be filled in."""
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
        Problem: the SDK is not installed, or knows no such image.
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
    """The table of instance types, with the live price of one of them where the account may ask.

    Returns:
        The table, and where the price comes from if not from the table.
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
    return error_code(error) if isinstance(error, ClientError) else type(error).__name__
