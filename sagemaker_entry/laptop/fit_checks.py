"""A training checked exactly as `fit` checks it: parsed by Lightning's parser, its dataset read and its model built."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from dino_lightning import Batch, CocoDataModule, DINOModule
from dino_lightning.cli.lightning_cli import parsed_options
from dino_lightning.cli.run_options import asked_for, check_metrics
from dino_lightning.training.compilation import check_graphs_of
from sagemaker_entry.laptop.checked import Checked, mean_size
from sagemaker_entry.laptop.fit_options import refuse_for_a_job, refuse_secrets
from sagemaker_entry.laptop.model_size import is_published, published_operations
from sagemaker_entry.protocol.problem import Problem


def checked_by_fit(arguments: Sequence[str]) -> Checked:
    """Make all checks of `fit` that need no training.

    Args:
        arguments: of `fit`, each as --name=value, or as --config and a file.

    Raises:
        Problem: an option does not go along with a job.
        UserError, ArgumentError, MisconfigurationException: bad input, see `command.expected_errors`.
        ValueError, TypeError: a value that the data module, the model or a callback refuses.
    """
    as_parsed = parsed_options(arguments)
    parsed = as_parsed.as_dict()
    refuse_secrets(parsed)
    refuse_for_a_job(parsed)
    check_graphs_of(as_parsed, "cuda")  # an instance without a GPU refuses them itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the printed summary counts the repairs
        dataset = CocoDataModule(**parsed["data"])
    _check_callbacks(as_parsed, dataset)
    image_size = mean_size(dataset)
    teraflops, parameters = forward_cost(parsed["model"], dataset)
    return Checked(parsed, dataset, image_size, teraflops, parameters)


def _check_callbacks(options: Any, data: CocoDataModule) -> None:
    """Refuse options that `fit` checks when it makes its callbacks.

    Raises:
        ValueError: a metric that does not exist, or a value out of range.
        Problem: an accumulation that --auto_batch_size would have to choose.
    """
    check_metrics(options, data.class_names)
    asked_for(options, fitting=True)
    accumulated = options.trainer.accumulate_grad_batches
    if options.auto_batch_size is not None and accumulated != 1:
        raise Problem(
            "--auto_batch_size chooses the accumulation itself: leave out "
            f"trainer.accumulate_grad_batches={accumulated}, or set data.batch_size yourself."
        )


def forward_cost(model: dict[str, Any], data: CocoDataModule) -> tuple[float, int]:
    """(10^12 floating-point operations of a forward pass of one image of average size, trainable parameters).

    From a table for the published architecture; else counted on fake tensors, so that the pass needs neither memory nor
    time; the model is a real one, because some backbones read values while they are built. A multiply-add counts as two
    operations.
    """
    height, width = mean_size(data)
    module = DINOModule(num_classes=data.num_classes, **{k: v for k, v in model.items() if k != "num_classes"})
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    if is_published(model):
        return published_operations(height, width), parameters
    return counted_operations(module, height, width), parameters


def counted_operations(module: DINOModule, height: int, width: int) -> float:
    """10^12 operations of a forward pass of one image of this size, counted; freezes the module."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # both cost seconds, with what they import
    from torch.utils.flop_counter import FlopCounterMode

    module.requires_grad_(False).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, torch.no_grad():
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        module.model(Batch.from_images([image]))
    return float(counter.get_total_flops()) / 1e12
