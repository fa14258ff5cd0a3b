"""Checks of the AWS account before the upload: role, bucket and price; each failure says what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from sagemaker_entry.laptop.account import DENIED, Account, error_code, explained
from sagemaker_entry.laptop.trust import trusts_sagemaker
from sagemaker_entry.protocol.instances import INSTANCES, Instance
from sagemaker_entry.protocol.problem import Problem


def resolve_role(account: Account, role: str) -> tuple[str, str]:
    """The ARN of the job's role, and what was found out about it: that it exists, and that SageMaker may assume it.

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
            return role, f"{role}, not checked (iam:GetRole is not allowed); SageMaker will reject a wrong one"
        if error_code(error) == "NoSuchEntity":
            raise Problem(
                f"--role: account {account.id} has no role {name!r}; docs/sagemaker.md shows how to create one."
            ) from error
        with explained(f"read the role {name} (iam:GetRole)"):
            raise
    trust = found.get("AssumeRolePolicyDocument") or {}
    trust = json.loads(trust) if isinstance(trust, str) else trust
    trusted, conditional = trusts_sagemaker(trust)
    if not trusted:
        raise Problem(
            f"--role: SageMaker may not assume {name!r}; its trust relationship must allow sts:AssumeRole to "
            "sagemaker.amazonaws.com, and no statement may deny it, as docs/sagemaker.md shows."
        )
    arn: str = found["Arn"]
    return arn, f"{arn}, SageMaker may assume it" + (" under conditions, not evaluated here" if conditional else "")


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


def make_bucket(account: Account, bucket: str, kms_key: str | None = None) -> None:
    """Create a bucket without public access, encrypted by default, with S3's own keys or a KMS key.

    Raises:
        Problem: AWS refused.
    """
    s3 = account.client("s3")
    place = {} if account.region == "us-east-1" else {
        "CreateBucketConfiguration": {"LocationConstraint": account.region}
    }  # fmt: skip
    rule = {"SSEAlgorithm": "AES256"} if kms_key is None else {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": kms_key}
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
            ServerSideEncryptionConfiguration={"Rules": [{"ApplyServerSideEncryptionByDefault": rule}]},
        )


COMPONENTS = {"Train": "Training", "Host": "Hosting", "Tsform": "Batch Transform"}  # of AWS's price list, by usage type


def live_price(pricing: Any, instance_type: str, region: str, use: str = "Train") -> float | None:
    """Dollars an hour on demand from AWS's price list; None if the account may not read it or it has no such price.

    Args:
        pricing: a boto3 client for `pricing`, in us-east-1.
        instance_type: the job's instance type.
        region: the job's region.
        use: what the instances are for, a name of `COMPONENTS`.
    """
    if region == "us-east-1":
        fields = {"usagetype": f"USE1-{use}:{instance_type}"}
    else:  # there, usage types begin with AWS's own abbreviation of the region, which has no official list
        fields = {"regionCode": region, "instanceName": instance_type, "component": COMPONENTS[use]}
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
    """An instance type that the table lacks, from EC2 and without a price; None if unknown there or without a GPU."""
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
        price=None,
    )


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
    table[instance_type] = instance
    price = live_price(account.client("pricing", "us-east-1"), instance_type, account.region)
    if price is not None:
        table[instance_type] = replace(instance, price=price, region=account.region)
        return table, f"AWS price list, {account.region}, read just now"
    return table, None
