"""`launch --trial` on the laptop: the options of its job, where its measurements lie, and the plan that they give.

The measurements lie in the bucket, as the job's checkpoints would, in a folder named by the instances and by all
options that change the speed: whoever launches that training in this account next finds them, from any machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from sagemaker_entry.laptop.compute import Compute
from sagemaker_entry.laptop.estimate import HOUR, Work
from sagemaker_entry.laptop.training_config import DATA_PATHS, Training
from sagemaker_entry.protocol.trial import STEPS, TRIAL_FILE, VAL_IMAGES, Measured, read_measured

TRIAL_HOURS = 20 / 60  # its limit, unless the user gives another
MARGIN = (0.9, 1.0, 1.25)  # best, likely, worst: 30 batches of random images, and clocks that fall as GPUs heat up
OUTSIDE_SECONDS = 180.0  # billed around the container, which does not see it: image, data, the upload at its end
# Options that do not change the time of a step or an evaluation; all others do, or may.
OF_NO_WEIGHT = {
    "model": (
        "weights", "class_map", "weights_for_rooms", "rooms_lr_factor", "backbone_weights", "lr", "backbone_lr",
        "backbone_layer_decay", "weight_decay", "warmup_steps", "lr_schedule", "lr_drop_epochs", "lr_drop_factor",
        "class_loss_weight", "bbox_loss_weight", "giou_loss_weight", "cost_class", "cost_bbox", "cost_giou",
        "box_noise_scale", "label_noise_ratio", "dropout", "clip_grad_norm", "max_non_finite_steps",
    ),
    "data": (*DATA_PATHS, "seed", "val_fraction"),
    "trainer": (
        "accelerator", "strategy", "devices", "num_nodes", "max_epochs", "min_epochs", "max_steps", "min_steps",
        "max_time", "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
        "check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps", "enable_progress_bar",
    ),
    "": ("seed_everything", "best_by", "early_stopping_patience", "ema_decay", "ema_tau", "lr_scheduler", "config"),
}  # fmt: skip


def trial_arguments(training: Training) -> tuple[str, ...]:
    """The options of `fit` for a trial: those of the training, but one evaluation of some images whenever it ends."""
    batches = math.ceil(VAL_IMAGES / training.length.val_batch_size)
    limit = training.length.limit_val_batches
    fewer = () if isinstance(limit, int) and limit < batches else (f"--trainer.limit_val_batches={batches}",)
    return (
        *training.arguments,
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.val_check_interval=1.0",
        "--trainer.min_epochs=null",
        "--trainer.min_steps=null",
        *fewer,
    )


def what_a_trial_runs(work: Work, gpus: int) -> str:
    """What it runs instead of the whole training, in words."""
    amount = work.on(gpus)
    images = min(VAL_IMAGES * gpus, amount.val_images)
    return f"{min(STEPS, amount.steps)} optimizer steps and an evaluation of {images} images, to measure them"


def trial_key(training: Training, compute: Compute, image: str) -> str:
    """A name for everything that decides how long a step takes."""
    left: dict[str, Any] = {}
    for name, value in training.options.items():
        if name in OF_NO_WEIGHT[""]:
            continue
        drop = OF_NO_WEIGHT.get(name, ())
        left[name] = {key: inner for key, inner in value.items() if key not in drop} if drop else value
    sizes = [round(side / 32) for side in training.image_size]
    told = [compute.instance_type, compute.count, image, sizes, training.data.num_classes, left]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_measured(s3: Any, bucket: str, prefix: str, owner: str) -> Measured | None:
    """The newest measurements below a prefix; None where there are none, or where they cannot be read.

    Args:
        s3: a boto3 client.
        bucket: the bucket.
        prefix: the folder of one key.
        owner: the account that must own the bucket.
    """
    from botocore.exceptions import BotoCoreError, ClientError  # --local works without AWS's packages

    try:
        pages = s3.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=f"{prefix}/", ExpectedBucketOwner=owner
        )
        found = [
            entry for page in pages for entry in page.get("Contents", []) if entry["Key"].endswith(f"/{TRIAL_FILE}")
        ]
        for entry in sorted(found, key=lambda entry: entry["LastModified"], reverse=True):
            body = s3.get_object(Bucket=bucket, Key=entry["Key"], ExpectedBucketOwner=owner)["Body"]
            measured = read_measured(body.read().decode(errors="replace"))
            if measured is not None:
                return measured
    except (ClientError, BotoCoreError):  # the plan is an estimate then, as without a trial
        return None
    return None


def measured_hours(
    work: Work, gpus: int, measured: Measured, outside: float = OUTSIDE_SECONDS
) -> tuple[float, float, float]:
    """Hours of the whole training (best, likely, worst) by what a trial has measured.

    Args:
        work: the size of the training.
        gpus: the processes that it is to run on.
        measured: of a trial with the same options on the same instances.
        outside: seconds that are billed around the container.
    """
    amount = work.on(gpus)
    share = measured.batch_size / amount.batch_size  # below 1 where --auto_batch_size found less room than hoped
    training = amount.all_batches * measured.seconds_per_batch / share
    evaluation = math.ceil(amount.val_images / gpus) * measured.seconds_per_val_image
    evaluations = amount.evaluations * (evaluation + measured.seconds_after_evaluation)
    start = outside + measured.seconds_to_start
    best, likely, worst = ((start + factor * (training + evaluations)) / HOUR for factor in MARGIN)
    return best, likely, worst


def local_report(root: Path, work: Work) -> str:
    """What a trial on this machine has measured, and how long the whole training would take here."""
    file = root / "checkpoints" / TRIAL_FILE
    measured = read_measured(file.read_text()) if file.is_file() else None
    if measured is None:
        return f"The trial left no measurements in {file}."
    best, likely, worst = measured_hours(work, measured.processes, measured, outside=0.0)
    amount = work.on(measured.processes)
    lines = [
        "Measured by this trial",
        *(f"  {line}" for line in measured.lines()),
        f"  The whole training on this machine ({amount.steps:,} steps, {amount.evaluations} evaluations): about "
        f"{likely:.2g} hours ({best:.2g} to {worst:.2g}).",
    ]
    return "\n".join(lines)
