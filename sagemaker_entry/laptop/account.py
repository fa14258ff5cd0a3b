"""The AWS account: creates the clients, and turns the errors of AWS into one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
    ProfileNotFound,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from sagemaker_entry.protocol.problem import Problem

DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403", "AuthorizationError")
SDK_MISSING = "Launching needs the SageMaker SDK: python -m pip install 'dino-lightning[sagemaker]'"
_BAD_KEYS = ("InvalidClientTokenId", "SignatureDoesNotMatch", "UnrecognizedClientException", "InvalidAccessKeyId")


class NoAccount(Problem):
    """There are no valid AWS credentials, or no region is set."""


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
        with explained("ask who you are (sts:GetCallerIdentity)"):
            number: str = self.client("sts").get_caller_identity()["Account"]
        return number


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an error of the AWS calls inside into a `Problem`; `what` completes "AWS did not let us ...".

    Raises:
        Problem: AWS refused the call, could not be reached, or had no valid credentials.
    """
    try:
        yield
    except (NoCredentialsError, TokenRetrievalError, UnauthorizedSSOTokenError) as error:
        raise NoAccount(
            "There are no AWS credentials, or they have expired; run `aws configure` or `aws sso login`, or set "
            "AWS_PROFILE."
        ) from error
    except NoRegionError as error:
        raise NoAccount("No AWS region is set; give --region, or set one with `aws configure`.") from error
    except EndpointConnectionError as error:
        raise Problem(f"AWS cannot be reached ({error}); check the network and --region.") from error
    except ClientError as error:
        code, message = error_code(error), error.response["Error"].get("Message", "")
        if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired"):
            raise Problem("The AWS credentials have expired; log in again, e.g. with `aws sso login`.") from error
        if code in _BAD_KEYS:
            raise Problem(
                f"AWS does not accept the credentials ({code}); run `aws configure` or set AWS_PROFILE."
            ) from error
        if code in DENIED:
            raise Problem(
                f"AWS did not let us {what}: {message or code}; the policy in docs/sagemaker.md allows it."
            ) from error
        raise Problem(f"AWS could not {what}: {code}: {message}") from error
    except BotoCoreError as error:
        raise Problem(f"AWS could not {what}: {error}") from error


def error_code(error: ClientError) -> str:
    """The error code of an AWS error, e.g. "AccessDenied"."""
    code: str = error.response["Error"]["Code"]
    return code
