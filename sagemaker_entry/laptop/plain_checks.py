"""The checks of an ordinary training without PyTorch and Lightning, whose import takes most of a dry run.

Ordinary is a training that is right in every value, by conditions at least as strict as those of `fit`, with a model
whose size is known by arithmetic. Everything else, and all that is wrong, is left to `fit_checks`, which knows the
sentences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dino_lightning.cli.plain_options import parsed_plainly
from dino_lightning.data.class_choice import class_choice
from dino_lightning.data.option_checks import check_options
from dino_lightning.training.option_checks import check_numbers
from sagemaker_entry.laptop.checked import Checked, mean_size, read_dataset_on_disk
from sagemaker_entry.laptop.fit_options import refuse_for_a_job, refuse_secrets
from sagemaker_entry.laptop.model_size import is_known, is_published, operations, parameters, published_operations

MOST_PARAMETERS = 10**9  # of an ordinary model; whether memory holds more is seen when it is built
BEST_BY = ("val/loss", "val/AP", "val/AP50", "val/AP75", "val/F1")  # that a validation has, whatever the dataset
# Options of the data that other code than the reading of annotation files checks or acts upon, and their defaults.
ONLY_READ = {
    "augmentation_options": None, "cache_dir": None, "transforms": None, "drawn_plans": 0,
    "repeat_factor_threshold": None,
}  # fmt: skip
WEIGHTS_OF_LOSSES = (
    "class_loss_weight", "bbox_loss_weight", "giou_loss_weight", "cost_class", "cost_bbox", "cost_giou",
)  # fmt: skip


def checked_plainly(arguments: Sequence[str]) -> Checked | None:
    """Check an ordinary training; None for another one.

    Args:
        arguments: of `fit`, each as --name=value, or as --config and a file.

    Raises:
        Problem: an option does not go along with a job.
        DataError: something is wrong with the dataset.
        ValueError: the choice of classes names one that does not exist.
    """
    options = parsed_plainly(arguments)
    if options is None or not _is_ordinary(options):
        return None
    refuse_secrets(options)
    refuse_for_a_job(options)
    data = read_dataset_on_disk(options["data"])
    model, (height, width) = options["model"], mean_size(data)
    count = parameters(model, data.num_classes)
    if count > MOST_PARAMETERS:
        return None
    if is_published(model):
        teraflops = published_operations(height, width)
    else:
        teraflops = operations(model, data.num_classes, height, width)
    return Checked(options, data, (height, width), teraflops, count)


def _is_ordinary(options: Mapping[str, Any]) -> bool:
    model, data = options["model"], options["data"]
    if options["best_by"] not in BEST_BY or options["auto_batch_size"] is not None:
        return False
    if not (options["ema_decay"] is None or options["ema_decay"] == 0 or 0 < options["ema_decay"] < 1):
        return False
    if model["cuda_graphs"] or any(data[name] != value for name, value in ONLY_READ.items()):
        return False
    weights = [model[name] for name in WEIGHTS_OF_LOSSES if model[name] is not None]
    if not all(0 < weight < math.inf for weight in weights):
        return False
    if not (model["nms_iou_threshold"] is None or 0 < model["nms_iou_threshold"] <= 1):
        return False
    try:
        check_numbers(model)
        check_options(**data)
        class_choice(data["classes"], data["merge_classes"])
    except ValueError:
        return False
    return is_known(model)
