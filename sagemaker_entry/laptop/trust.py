"""Whether a role's trust relationship lets SageMaker assume it: read as the policy that it is."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

SERVICE, ACTION = "sagemaker.amazonaws.com", "sts:AssumeRole"


def trusts_sagemaker(policy: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether SageMaker may assume the role, and whether that hangs on conditions, which are not evaluated here.

    A statement that denies it wins over all that allow it. One that denies it under a condition may or may not apply.

    Args:
        policy: the trust relationship, an IAM policy document.
    """
    concerned = [statement for statement in _listed(policy.get("Statement")) if _concerns(statement)]
    denied = [statement for statement in concerned if statement.get("Effect") == "Deny"]
    allowed = [statement for statement in concerned if statement.get("Effect") == "Allow"]
    if not allowed or any(not statement.get("Condition") for statement in denied):
        return False, False
    return True, bool(denied) or all(statement.get("Condition") for statement in allowed)


def _concerns(statement: Any) -> bool:
    """Whether a statement is about SageMaker's assuming the role."""
    if not isinstance(statement, Mapping):
        return False
    if "NotPrincipal" in statement:
        principal = not _names_service(statement["NotPrincipal"])
    else:
        principal = _names_service(statement.get("Principal"))
    if "NotAction" in statement:
        return principal and not _names_action(statement["NotAction"])
    return principal and _names_action(statement.get("Action"))


def _names_service(principal: Any) -> bool:
    if principal == "*":
        return True
    return isinstance(principal, Mapping) and SERVICE in _listed(principal.get("Service"))


def _names_action(actions: Any) -> bool:
    return any(isinstance(name, str) and fnmatchcase(ACTION.lower(), name.lower()) for name in _listed(actions))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
