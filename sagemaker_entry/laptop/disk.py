"""Whether a dataset finds room on the disks of a job's instances."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagemaker_entry.laptop.checked import DatasetOnDisk
from sagemaker_entry.laptop.submit import VOLUME_GB, has_own_disk
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:
    from dino_lightning import CocoDataModule

FILE, FAST_FILE = "File", "FastFile"
INPUT_MODES = (FILE, FAST_FILE)
# GB of the NVMe disks of one instance, together, as EC2 says of the types without "ml."; a test compares. SageMaker
# puts /opt/ml and /tmp there. How much of those of g6e, p4 and p5 a job gets was not seen, so they are not in it.
NVME_GB = {
    "ml.g4dn.xlarge": 125, "ml.g4dn.2xlarge": 225, "ml.g4dn.4xlarge": 225, "ml.g4dn.8xlarge": 900,
    "ml.g4dn.12xlarge": 900, "ml.g4dn.16xlarge": 900,
    "ml.g5.xlarge": 250, "ml.g5.2xlarge": 450, "ml.g5.4xlarge": 600, "ml.g5.8xlarge": 900, "ml.g5.16xlarge": 1900,
    "ml.g5.12xlarge": 3800, "ml.g5.24xlarge": 3800, "ml.g5.48xlarge": 7600,
    "ml.g6.xlarge": 250, "ml.g6.2xlarge": 450, "ml.g6.4xlarge": 600, "ml.g6.8xlarge": 900, "ml.g6.16xlarge": 1880,
    "ml.g6.12xlarge": 3760, "ml.g6.24xlarge": 3760, "ml.g6.48xlarge": 7520,
}  # fmt: skip
FOR_THE_REST_GB = 10.0  # packages, weights, checkpoints and the model


def dataset_gb(data: CocoDataModule | DatasetOnDisk) -> float:
    """GB of all images of a dataset, which is what its shards take."""
    sets = [dataset.annotations for dataset in (data.train_set, data.val_set, data.test_set) if dataset is not None]
    paths = {source.image_path(index) for source in sets for index in range(len(source.images))}
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e9


def check_disk(instance_type: str, size: float, mode: str) -> str:
    """What the dataset takes on the disk of each instance, in words.

    In File mode SageMaker copies the packed dataset to the disk before the job starts, which unpacks it beside that. In
    FastFile mode the job reads the packed dataset from S3 while it unpacks it, so it lies on the disk once.

    Args:
        instance_type: the job's.
        size: GB of the dataset.
        mode: of `INPUT_MODES`.

    Raises:
        Problem: it does not fit.
    """
    copies = 2 if mode == FILE else 1
    needed = copies * size
    disk = NVME_GB.get(instance_type) if has_own_disk(instance_type) else VOLUME_GB
    shown = f"{needed:,.1f}" if needed >= 0.1 else "less than 0.1"
    what = f"{shown} GB for the dataset, " + ("packed and unpacked" if mode == FILE else "streamed and unpacked")
    if disk is None:
        return f"{what}; how large the disk of {instance_type} is, is not known here"
    if needed + FOR_THE_REST_GB > disk:
        streamed = mode == FILE and size + FOR_THE_REST_GB <= disk
        advice = f"add --input-mode {FAST_FILE}, which streams it from S3 and needs half as much" if streamed else (
            "choose an instance type with a larger disk"
        )  # fmt: skip
        raise Problem(
            f"The dataset does not fit on {instance_type}: {what}, and {FOR_THE_REST_GB:.0f} GB for the rest, on a "
            f"disk of {disk} GB; {advice}."
        )
    return f"{what}, of {disk} GB"
