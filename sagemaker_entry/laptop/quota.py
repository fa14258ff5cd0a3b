"""How many instances of a type the account may use at once, and what to do where they are too few."""

from __future__ import annotations

from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from sagemaker_entry.laptop.account import error_code
from sagemaker_entry.protocol.instances import INSTANCES
from sagemaker_entry.protocol.problem import Problem


def quota_name(instance_type: str, *, spot: bool, use: str = "training job") -> str:
    """The name that Service Quotas has for it."""
    return f"{instance_type} for {'spot ' if spot else ''}{use} usage"


def check_quota(
    quotas: Any, instance_type: str, count: int, *, spot: bool, region: str, use: str = "training job"
) -> str:
    """Check that the account may use this number of instances of a type at once.

    Args:
        quotas: a boto3 client for `service-quotas`.
        instance_type: the job's instance type.
        count: the number of instances.
        spot: whether to check the separate quota of spot instances.
        region: the job's region, for the command that requests a larger quota.
        use: what the instances are for, in the words of Service Quotas.

    Returns:
        What was found out, in words.

    Raises:
        Problem: the quota is too small.
    """
    name = quota_name(instance_type, spot=spot, use=use)
    try:
        found, whose = _find(quotas, "list_service_quotas", name), ""
        if found is None:  # an account that never asked for more has no value of its own
            found, whose = _find(quotas, "list_aws_default_service_quotas", name), ", AWS's default"
    except (ClientError, BotoCoreError) as error:
        reason = error_code(error) if isinstance(error, ClientError) else type(error).__name__
        return f"not checked (servicequotas:ListServiceQuotas, servicequotas:ListAWSDefaultServiceQuotas: {reason})"
    if found is None:
        return f"not checked: AWS lists none of the name {name!r}; a new account may have to ask for it in the console"
    if found["Value"] < count:
        raise Problem(
            f"Your quota {name!r} is {found['Value']:g}{whose}, but {count} are needed; request more (it is free): "
            f"{increase_command(found['QuotaCode'], count, region)}"
        )
    return f"{found['Value']:g} of {name}{whose}, {count} needed"


def increase_command(code: str, count: int, region: str) -> str:
    """The command that asks AWS for a larger quota."""
    return (
        f"aws service-quotas request-service-quota-increase --service-code sagemaker --quota-code {code} "
        f"--desired-value {count} --region {region}"
    )


def _find(quotas: Any, operation: str, name: str) -> dict[str, Any] | None:
    pages = quotas.get_paginator(operation).paginate(ServiceCode="sagemaker")
    return next((quota for page in pages for quota in page["Quotas"] if quota["QuotaName"] == name), None)


def what_else_would_do(instance_type: str, count: int, region: str) -> str:
    """Other instance types of the table with as many GPUs of as much memory, and other regions with a known price."""
    own = INSTANCES.get(instance_type)
    if own is None:
        return f"other types: {', '.join(list(INSTANCES)[:4])}"
    needed = count * own.gpus
    others = sorted(
        (needed // other.gpus * other.price, f"--instance-type {name} --instance-count {needed // other.gpus}")
        for name, other in INSTANCES.items()
        if name != instance_type
        and other.price is not None
        and other.gpu_memory >= own.gpu_memory
        and needed % other.gpus == 0
    )
    types = " or ".join(f"{option} (${price:.2f} an hour)" for price, option in others[:3])
    regions = sorted(
        {other.region for other in INSTANCES.values() if other.gpu == own.gpu and other.price is not None} - {region}
    )
    elsewhere = f"; or another region, such as --region {' or --region '.join(regions)}" if regions else ""
    return f"{types}{elsewhere}"


def no_room(error_text: str, instance_type: str, count: int, region: str, *, spot: bool) -> str | None:
    """What to do about a job that AWS has no quota or no machines for, or None if that is not what the text says."""
    others = what_else_would_do(instance_type, count, region)
    if "ResourceLimitExceeded" in error_text:
        name = quota_name(instance_type, spot=spot)
        return (
            f"The quota {name!r} is used up or too small. See it and ask for more (free, hours to days): aws "
            f"service-quotas list-service-quotas --service-code sagemaker --region {region} --query "
            f"\"Quotas[?QuotaName=='{name}']\". Others that would do: {others}."
        )
    if "CapacityError" in error_text or "InsufficientCapacity" in error_text:
        return f"AWS has no free {instance_type} in {region} now. Try again later, or: {others}."
    return None
