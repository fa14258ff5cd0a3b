"""AWS's PyTorch training images: a small dated table, so that an older SDK knows the newer ones too."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from sagemaker_entry.laptop.account import DENIED, Account, error_code
from sagemaker_entry.protocol.problem import Problem

TABLE_DATE = "2026-11"  # of the image lists of sagemaker 3.27, from which accounts and tags are
TABLE_SDK = "3.27"  # these lists say nothing of Python, CUDA and patches: those are from AWS's pages, or not known
DEFAULT_TORCH = "2.10"
CUDA_13_DRIVER = 580  # NVIDIA's oldest driver for CUDA 13
TOO_OLD_FOR_CUDA_13 = ("V100", "P100", "K80")  # CUDA 13 has no code for GPUs before Turing


@dataclass(frozen=True)
class TrainingImage:
    """One of AWS's images.

    Attributes:
        repository: of the registry.
        tag: of the image for GPUs.
        python: its Python, or None where it was not looked up.
        cuda: its CUDA's major version, or None where it was not looked up.
        patched_until: the day after which AWS mends nothing in it, or None where it was not looked up.
    """

    repository: str
    tag: str
    python: str | None
    cuda: int | None
    patched_until: datetime.date | None = None


IMAGES = {
    "2.8": TrainingImage("pytorch-training", "2.8-gpu-py312", "3.12", 12, datetime.date(2026, 8, 6)),
    "2.10": TrainingImage("pytorch-training", "2.10-gpu-py313", "3.13", 13, datetime.date(2027, 1, 21)),
    "2.11": TrainingImage("pytorch", "2.11-cu130-amzn2023-sagemaker", "3.12", 13, datetime.date(2027, 4, 30)),
    "2.12": TrainingImage("pytorch", "2.12-cu130-amzn2023-sagemaker", "3.12", 13, datetime.date(2027, 7, 2)),
    "2.13": TrainingImage("pytorch", "2.13-cu133-amzn2023-sagemaker", "3.12", 13, datetime.date(2027, 7, 20)),
    "2.14": TrainingImage("pytorch", "2.14-cu133-amzn2023-sagemaker", None, 13),
}
USUAL_ACCOUNT = "763104351884"
USUAL_REGIONS = (
    "ap-northeast-1", "ap-northeast-2", "ap-south-1", "ap-southeast-1", "ap-southeast-2", "ca-central-1",
    "eu-central-1", "eu-north-1", "eu-west-1", "eu-west-2", "eu-west-3", "sa-east-1", "us-east-1", "us-east-2",
    "us-west-1", "us-west-2",
)  # fmt: skip
ACCOUNTS = dict.fromkeys(USUAL_REGIONS, USUAL_ACCOUNT) | {
    "af-south-1": "626614931356", "ap-east-1": "871362719292", "ap-east-2": "975050140332",
    "ap-northeast-3": "364406365360", "ap-south-2": "772153158452", "ap-southeast-3": "907027046896",
    "ap-southeast-4": "457447274322", "ap-southeast-5": "550225433462", "ap-southeast-6": "633930458069",
    "ap-southeast-7": "590183813437", "ca-west-1": "204538143572", "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807", "eu-central-2": "380420809688", "eu-south-1": "692866216735",
    "eu-south-2": "503227376785", "il-central-1": "780543022126", "me-central-1": "914824155844",
    "me-south-1": "217643126080", "me-west-1": "124382933778", "mx-central-1": "637423239942",
    "us-gov-east-1": "446045086412", "us-gov-west-1": "442386744353",
}  # fmt: skip
ADDRESS = re.compile(
    r"(?P<account>\d{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/"
    r"(?P<repository>[a-z0-9]+(?:[._/-][a-z0-9]+)*)(?::(?P<tag>[\w][\w.-]{0,127})|@(?P<digest>sha256:[0-9a-f]{64}))"
)


def image_address(region: str, torch: str | None = None) -> str:
    """The address of AWS's training image for GPUs in a region.

    Args:
        region: of the job.
        torch: the PyTorch version; `DEFAULT_TORCH` by default.

    Raises:
        Problem: the table has no such version or region.
    """
    version = torch or DEFAULT_TORCH
    image = IMAGES.get(version)
    if image is None:
        raise Problem(
            f"--torch {version}: the table has images of PyTorch {', '.join(IMAGES)}; name another by --image."
        )
    account = ACCOUNTS.get(region)
    if account is None:
        raise Problem(f"No account of AWS's images is known for {region}; name an image of that region with --image.")
    suffix = ".cn" if region.startswith("cn-") else ""
    return f"{account}.dkr.ecr.{region}.amazonaws.com{suffix}/{image.repository}:{image.tag}"


def image_notes(address: str, gpu: str, today: datetime.date) -> list[str]:
    """What speaks against an image of the table on a kind of GPU, one sentence each."""
    image = next((known for known in IMAGES.values() if address.endswith(f"/{known.repository}:{known.tag}")), None)
    if image is None:
        return []
    notes = []
    if image.patched_until is not None and today > image.patched_until:
        newer = [name for name, other in IMAGES.items() if other.patched_until and today <= other.patched_until]
        advice = f"; --torch {newer[0]} is patched" if newer else ""
        notes.append(f"AWS has patched the image {image.tag} until {image.patched_until} only{advice}.")
    if image.cuda == 13 and gpu in TOO_OLD_FOR_CUDA_13:
        notes.append(f"The image {image.tag} is of CUDA 13, which does not know the {gpu}: choose --torch 2.8.")
    elif image.cuda == 13:
        notes.append(
            f"The image is of CUDA 13 and needs a driver of {CUDA_13_DRIVER} or newer on the host. With an older one "
            "the job ends at once, saying that PyTorch sees no GPU; --torch 2.8 then runs."
        )
    return notes


def image_python(address: str) -> str | None:
    """The Python of an image of the table, such as "3.12"; None for another image.

    Raises:
        Problem: the image is of the table, but its Python is not known.
    """
    for version, image in IMAGES.items():
        if address.endswith(f"/{image.repository}:{image.tag}"):
            if image.python is None:
                raise Problem(
                    f"The Python of AWS's image of PyTorch {version} is not known here, and --network-isolation sends "
                    "packages for one Python along; choose another --torch."
                )
            return image.python
    return None


def check_address(address: str, region: str) -> None:
    """Check the form of an image's address, and that it is in the job's region.

    Raises:
        Problem: SageMaker would refuse it.
    """
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise Problem(
            f"--image {address!r} is no address of an image in ECR; it looks like "
            "123456789012.dkr.ecr.us-east-1.amazonaws.com/NAME:TAG."
        )
    if found["region"] != region:
        raise Problem(
            f"--image is in {found['region']}, the job in {region}; SageMaker takes images of its own region."
        )


def look_up(account: Account, address: str) -> str:
    """What was found out about an image, in words.

    Raises:
        Problem: the registry has no such image.
    """
    found = ADDRESS.fullmatch(address)
    assert found is not None  # `check_address` has refused others
    if found["account"] == ACCOUNTS.get(account.region):
        return f"AWS's own, by the table of {TABLE_DATE}"
    wanted: dict[str, Any] = {"imageTag": found["tag"]} if found["tag"] else {"imageDigest": found["digest"]}
    try:
        answer = account.client("ecr").batch_get_image(
            registryId=found["account"], repositoryName=found["repository"], imageIds=[wanted]
        )
    except ClientError as error:
        if error_code(error) == "RepositoryNotFoundException":
            raise Problem(f"--image: {found['account']} has no repository {found['repository']!r} here.") from error
        return f"not looked up (ecr:BatchGetImage: {'denied' if error_code(error) in DENIED else error_code(error)})"
    except BotoCoreError as error:
        return f"not looked up (ecr:BatchGetImage: {type(error).__name__})"
    if not answer.get("images"):
        raise Problem(f"--image: the repository {found['repository']} has no image {found['tag'] or found['digest']}.")
    return "in the registry"
