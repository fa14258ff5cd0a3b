"""The AWS account: creates the clients, and turns the errors of AWS into one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
    ProfileNotFound,
    ReadTimeoutError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from sagemaker_entry.protocol.problem import Problem

DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403", "AuthorizationError")
SDK_MISSING = "Launching needs the SageMaker SDK: python -m pip install 'dino-lightning[sagemaker]'"
_BAD_KEYS = ("InvalidClientTokenId", "SignatureDoesNotMatch", "UnrecognizedClientException", "InvalidAccessKeyId")


class NoAccount(Problem):
    """There are no valid AWS credentials, or no region is set."""


class Unreachable(Problem):
    """AWS does not answer."""


class Account:
    """The AWS account and region of a job.

    Args:
        region: such as "us-east-1"; by default the configured one.
        profile: a profile of the AWS configuration files.

    Raises:
        Problem: unknown profile, no region, or an unknown region.
    """

    def __init__(self, region: str | None = None, profile: str | None = None) -> None:
        try:
            self.session = boto3.Session(region_name=region, profile_name=profile)
        except ProfileNotFound as error:
            raise Problem(
                f"There is no AWS profile {profile!r}; `aws configure --profile {profile}` creates it."
            ) from error
        if self.session.region_name is None:
            raise NoAccount("No AWS region is set; give --region, or set one with `aws configure`.")
        self.region: str = self.session.region_name
        known = self.session.get_available_regions("sagemaker")
        if known and self.region not in known:
            raise Problem(f"SageMaker knows no region {self.region!r}; give --region with one of {', '.join(known)}.")

    def client(self, service: str, region: str | None = None) -> Any:
        """A boto3 client of a service; it retries a few times when AWS throttles."""
        return self.session.client(
            service, region_name=region, config=Config(retries={"mode": "standard", "max_attempts": 5})
        )

    @cached_property
    def id(self) -> str:
        """The account number; asking AWS for it checks the credentials.

        Raises:
            Problem: there are no credentials, or AWS does not accept them.
        """
        quick = Config(connect_timeout=10, read_timeout=20, retries={"mode": "standard", "max_attempts": 2})
        with explained("ask who you are (sts:GetCallerIdentity)"):
            number: str = self.session.client("sts", config=quick).get_caller_identity()["Account"]
        return number


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an error of the AWS calls inside into a `Problem`; `what` completes "AWS did not let us ...".

    Raises:
        Problem: AWS refused the call, could not be reached, or had no valid credentials.
    """
    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error) as error:
        cause = _behind(error)
        raise _problem(cause, what) from cause


def _behind(error: Exception) -> Exception:
    """The error of AWS behind one of boto3's transfers, which tells it in its text alone."""
    behind = error.__cause__ or error.__context__
    told: bool = isinstance(error, Boto3Error) and isinstance(behind, (ClientError, BotoCoreError))
    return behind if told and isinstance(behind, Exception) else error


def _problem(error: Exception, what: str) -> Problem:
    """The sentence about an error of AWS or of its SDK."""
    if isinstance(error, (NoCredentialsError, TokenRetrievalError, UnauthorizedSSOTokenError)):
        return NoAccount(
            "There are no AWS credentials, or they have expired; run `aws configure` or `aws sso login`, or set "
            "AWS_PROFILE."
        )
    if isinstance(error, NoRegionError):
        return NoAccount("No AWS region is set; give --region, or set one with `aws configure`.")
    if isinstance(error, (EndpointConnectionError, ConnectTimeoutError, ReadTimeoutError)):
        return Unreachable(f"AWS cannot be reached ({error}); check the network and --region.")
    if not isinstance(error, ClientError):
        return Problem(f"AWS could not {what}: {' '.join(str(error).split())}")
    code, message = error_code(error), error.response["Error"].get("Message", "")
    if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired"):
        return NoAccount("The AWS credentials have expired; log in again, e.g. with `aws sso login`.")
    if code in _BAD_KEYS:
        return NoAccount(f"AWS does not accept the credentials ({code}); run `aws configure` or set AWS_PROFILE.")
    if code.startswith("KMS."):
        return Problem(f"AWS did not let us {what} with the bucket's encryption key: {code}: {message}")
    if code in DENIED:
        return Problem(f"AWS did not let us {what}: {message or code}; the policy in docs/sagemaker.md allows it.")
    return Problem(f"AWS could not {what}: {code}: {message}")


def error_code(error: ClientError) -> str:
    """The error code of an AWS error, e.g. "AccessDenied"."""
    code: str = error.response["Error"]["Code"]
    return code
