"""Commands for an existing job: stop it, fetch its model, resume it."""

from __future__ import annotations

import shutil
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from tqdm import tqdm

from sagemaker_entry.laptop.account import Account, error_code, explained
from sagemaker_entry.laptop.follow import ENDED, describe, dollars, tagged_price
from sagemaker_entry.laptop.places import COMMAND
from sagemaker_entry.protocol.manifest import extract_safely
from sagemaker_entry.protocol.problem import Problem

# Fields of DescribeTrainingJob's answer that CreateTrainingJob accepts.
CARRIED_OVER = (
    "AlgorithmSpecification", "RoleArn", "InputDataConfig", "OutputDataConfig", "ResourceConfig", "VpcConfig",
    "StoppingCondition", "EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining",
    "CheckpointConfig", "Environment", "RetryStrategy", "HyperParameters",
)  # fmt: skip


def stop(sagemaker: Any, job: str) -> str:
    """Ask SageMaker to stop a job; returns a message for the user.

    Raises:
        Problem: there is no such job, or AWS refused.
    """
    status = describe(sagemaker, job)["TrainingJobStatus"]
    if status in ENDED:
        return f"{job} is {status} already."
    with explained(f"stop the job {job} (sagemaker:StopTrainingJob)"):
        sagemaker.stop_training_job(TrainingJobName=job)
    return f"{job} saves a checkpoint and stops, within two minutes. Resume it later: {COMMAND} resume {job}"


def fetch(account: Account, job: str, target: Path) -> Path:
    """Download a job's model and unpack it into a new folder.

    Args:
        account: the job's account.
        job: the job's name.
        target: the new folder.

    Returns:
        The folder.

    Raises:
        Problem: the job has no model, the folder exists, or the archive was not written by a job.
    """
    if target.exists():
        raise Problem(f"{target} exists already; choose another folder with --to.")
    description = describe(account.client("sagemaker"), job)
    status = description["TrainingJobStatus"]
    uri = description.get("ModelArtifacts", {}).get("S3ModelArtifacts")
    if status not in ENDED or not uri:
        raise Problem(f"{job} is {status}; it has no model yet.")
    target.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        archive = workplace / "model.tar.gz"
        download(account, job, uri, archive)
        unpacked = workplace / "model"
        unpacked.mkdir()
        extract_safely(archive, unpacked)
        unpacked.rename(target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return target


def download(account: Account, job: str, uri: str, target: Path) -> None:
    """Download the model of a job.

    Args:
        account: the job's account.
        job: the job's name, for the error.
        uri: the S3 address of its model.tar.gz.
        target: the file to write.

    Raises:
        Problem: there is nothing, or AWS refused.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    s3 = account.client("s3")
    try:
        with explained(f"read {uri} (s3:GetObject)"):
            size = s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
            with tqdm(total=size, desc="downloading", unit="B", unit_scale=True, disable=None, delay=1) as progress:
                s3.download_file(bucket, key, str(target), Callback=progress.update)
    except Problem as problem:
        cause = problem.__cause__
        if isinstance(cause, ClientError) and error_code(cause) in ("404", "NoSuchKey"):
            raise Problem(
                f"{job} left no model at {uri}: it ended before its first evaluation, or was deleted."
            ) from problem
        raise


def resume_request(description: dict[str, Any], now: datetime) -> dict[str, Any]:
    """The request of a job that resumes another one: the same checkpoints, data and settings under a new name.

    Raises:
        Problem: the job is still running, has completed, or kept no checkpoints.
    """
    job, status = description["TrainingJobName"], description["TrainingJobStatus"]
    if status not in ("Failed", "Stopped"):
        advice = "it is finished" if status == "Completed" else "stop it first"
        raise Problem(f"{job} is {status}; {advice}.")
    if not description.get("CheckpointConfig"):
        raise Problem(f"{job} kept no checkpoints in S3, so it cannot be resumed; launch a new job.")
    request = {name: description[name] for name in CARRIED_OVER if description.get(name) not in (None, {}, [])}
    base, _, stamp = job.rpartition("-")
    if not stamp.isdigit():
        base = job
    names = (f"{base[:48]}-{now + timedelta(seconds=later):%Y%m%d%H%M%S}" for later in (0, 1))
    request["TrainingJobName"] = next(name for name in names if name != job)  # AWS accepts no name twice
    return request


def resume(account: Account, job: str) -> tuple[str, str]:
    """Start a job that resumes another one; returns its name and a sentence with its maximum cost.

    Raises:
        Problem: see `resume_request`; or AWS refused.
    """
    sagemaker = account.client("sagemaker")
    description = describe(sagemaker, job)
    request = resume_request(description, datetime.now(timezone.utc))
    with explained("start the training job (sagemaker:CreateTrainingJob, iam:PassRole)"):
        tags = sagemaker.list_tags(ResourceArn=description["TrainingJobArn"])["Tags"]
        # a resumed job has the tag "resumes" itself, and AWS accepts no key twice
        kept = [tag for tag in tags if not tag["Key"].startswith("aws:") and tag["Key"] != "resumes"]
        sagemaker.create_training_job(**request, Tags=[*kept, {"Key": "resumes", "Value": job}])
    name: str = request["TrainingJobName"]
    seconds = request["StoppingCondition"]["MaxRuntimeInSeconds"]
    waiting = request["ResourceConfig"].get("KeepAlivePeriodInSeconds", 0)  # for a next job, billed as well
    most = dollars(request, seconds + waiting, tagged_price(tags))
    price = "at an unknown price" if most is None else f"for ${most:,.2f} on demand at most"
    return name, f"It runs for another {seconds / 3600:.1f} hours at most, {price}, on top of what {job} has cost."
