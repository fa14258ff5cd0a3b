"""The AWS account: one place that makes clients, and that turns what AWS says into a sentence."""

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
    """Nobody is logged in to AWS, or no region is chosen."""


class Account:
    """The account and region to work in.

    Args:
        region: such as "us-east-1"; by default the one that is configured.
        profile: a profile of the AWS configuration files.

    Raises:
        Problem: no such profile, no region, or a region that there is not.
    """

    def __init__(self, region: str | None = None, profile: str | None = None) -> None:
        try:
            self.session = boto3.Session(region_name=region, profile_name=profile)
        except ProfileNotFound as error:
            raise Problem(
                f"There is no AWS profile {profile!r}; `aws configure --profile {profile}` makes one."
            ) from error
        if self.session.region_name is None:
            raise NoAccount("No AWS region is set; give --region, or set one with `aws configure`.")
        self.region: str = self.session.region_name
        known = self.session.get_available_regions("sagemaker")
        if known and self.region not in known:
            raise Problem(f"SageMaker knows no region {self.region!r}; known are {', '.join(known)}.")

    def client(self, service: str, region: str | None = None) -> Any:
        """A client that tries again a few times when AWS is busy."""
        return self.session.client(
            service, region_name=region, config=Config(retries={"mode": "standard", "max_attempts": 5})
        )

    @cached_property
    def id(self) -> str:
        """The number of the account; asking for it proves the credentials.

        Raises:
            Problem: there are none, or AWS does not accept them.
        """
        with explained("ask who you are (sts:GetCallerIdentity)"):
            number: str = self.client("sts").get_caller_identity()["Account"]
        return number


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors of AWS calls into sentences; `what` completes "AWS did not let us ...".

    Raises:
        Problem: whatever AWS said.
    """
    try:
        yield
    except (NoCredentialsError, TokenRetrievalError, UnauthorizedSSOTokenError) as error:
        raise NoAccount(
            "There are no AWS credentials, or they have run out; run `aws configure` or `aws sso login`, or set "
            "AWS_PROFILE."
        ) from error
    except NoRegionError as error:
        raise NoAccount("No AWS region is set; give --region, or set one with `aws configure`.") from error
    except EndpointConnectionError as error:
        raise Problem(f"AWS cannot be reached ({error}); check the network and --region.") from error
    except ClientError as error:
        code, message = error_code(error), error.response["Error"].get("Message", "")
        if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired"):
            raise Problem(
                "The AWS credentials have run out; log in again, with `aws sso login` for example."
            ) from error
        if code in _BAD_KEYS:
            raise Problem(
                f"AWS does not accept the credentials ({code}); run `aws configure` or set AWS_PROFILE."
            ) from error
        if code in DENIED:
            raise Problem(
                f"AWS did not let us {what}: {message or code}; the policy in the README allows it."
            ) from error
        raise Problem(f"AWS could not {what}: {code}: {message}") from error
    except BotoCoreError as error:
        raise Problem(f"AWS could not {what}: {error}") from error


def error_code(error: ClientError) -> str:
    """The code of an AWS error."""
    code: str = error.response["Error"]["Code"]
    return code
