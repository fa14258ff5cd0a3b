"""The training: configuration and dataset, checked on the laptop exactly as `fit` checks them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dino_lightning import Batch, CocoDataModule, DINOModule
from dino_lightning.cli.command import expected_errors, explain
from dino_lightning.cli.config_files import config_path
from dino_lightning.cli.lightning_cli import parsed_options
from dino_lightning.cli.run_options import asked_for, check_metrics
from dino_lightning.console import lacks_secrets, without_secrets
from dino_lightning.data.class_paths import KNOWN_PACKAGES, class_paths
from dino_lightning.data.transforms import resized_size
from dino_lightning.model import DINO
from dino_lightning.training.initial_weights import PLACES, starting_option
from dino_lightning.training.resume import flat
from dino_lightning.weights.backbone_loading import needs_download
from dino_lightning.weights.shipped import SHIPPED
from dino_lightning.weights.zoo import at_hand, zoo
from sagemaker_entry.laptop.fit_options import refuse_for_a_job
from sagemaker_entry.laptop.length import Length, length_of
from sagemaker_entry.protocol.problem import Problem

DATA_PATHS = (
    "root", "train_annotations", "train_images", "val_annotations", "val_images", "test_annotations", "test_images",
)  # fmt: skip
# Options of the model that decide its operations, and those of the published DINO R50 4-scale, where all have their
# defaults: 10^12 for an image, as `counted_operations` counts them (to 1 percent): counting takes seconds.
ARCHITECTURE = (
    "backbone", "backbone_norm", "feature_strides", "num_feature_levels", "hidden_dim", "num_heads", "num_points",
    "ffn_dim", "num_encoder_layers", "num_decoder_layers", "num_queries", "query_groups",
)  # fmt: skip
PUBLISHED_CONSTANT, PUBLISHED_PER_PIXEL = 0.0208, 5.11e-7


@dataclass(frozen=True)
class Training:
    """A checked training run, before the plan decides where it runs.

    Attributes:
        name: the configuration's name.
        config: the text of the configuration for the container, without the laptop's paths.
        arguments: further options of `fit`.
        weights: local weights files to upload, by the option of `fit` that names them.
        data: the dataset.
        options: of `fit`, as parsed.
        length: how many batches, steps and evaluations they allow.
        batch_size: images per step and process.
        gpus_wanted: the number of processes that the configuration is made for.
        backbone: the name of the backbone.
        start: the initial weights, in words.
        image_size: mean (height, width) of the training images as the model gets them.
        teraflops: floating-point operations of one forward pass of one image, in 10^12.
        parameters: trainable parameters.
        extras: of the package, whose requirements the job installs.
        fetched: weights that the container would download, by the option of `fit` that names them.
    """

    name: str
    config: str
    arguments: tuple[str, ...]
    weights: dict[str, Path]
    data: CocoDataModule
    options: Mapping[str, Any]
    length: Length
    batch_size: int
    gpus_wanted: int
    backbone: str
    start: str
    image_size: tuple[int, int]
    teraflops: float
    parameters: int
    extras: tuple[str, ...] = ()
    fetched: Mapping[str, str] = field(default_factory=dict)

    @property
    def train_images(self) -> int:
        """The number of training images in an epoch, each as often as it is drawn; drawn plans too."""
        return self.data.images_per_epoch

    @property
    def val_images(self) -> int:
        """The number of images in the validation split."""
        return len(self.data.val_set)


def check_training(config: str, data: str | None, extra: Sequence[str]) -> Training:
    """Read the configuration and the dataset, with all checks that `fit` makes; no address may have secrets.

    A value that `fit` would refuse only once it trains is refused here, before anything is uploaded or paid for.

    Args:
        config: a configuration file, or the name of one that comes with the package.
        data: the dataset's folder; None for the one in the configuration.
        extra: further options of `fit`, each as --name=value.

    Raises:
        Problem: training would fail with this configuration or dataset, or sets no number of epochs.
    """
    file = _existing_config(config)
    content = _read_config(file)
    told = any(argument.startswith("--data.root=") for argument in extra) or (content.get("data") or {}).get("root")
    if data is None and not told:
        raise Problem("--data is needed: the folder of the dataset.")
    given = [f"--data.root={data}"] if data is not None else []
    try:
        as_parsed = parsed_options(["--config", str(file), *extra, *given])
        parsed = as_parsed.as_dict()
        _refuse_secrets(parsed)
        refuse_for_a_job(parsed)
        module_options, data_options = parsed["model"], parsed["data"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the printed summary counts the repairs
            dataset = CocoDataModule(**data_options)
        _check_callbacks(as_parsed, dataset)
        image_size = mean_size(dataset)
        teraflops, parameters = forward_cost(module_options, dataset)
    except expected_errors() as error:
        raise Problem(explain(error)) from error
    except (ValueError, TypeError) as error:
        raise Problem(str(error)) from error
    trainer = parsed["trainer"]
    length = length_of(parsed)
    if not length.max_epochs and not length.max_steps:
        raise Problem(
            f"{file} sets no trainer.max_epochs; set it, because without it there is no estimate of what the run costs."
        )
    if length.limit_train_batches == 0:
        raise Problem("trainer.limit_train_batches is 0: a job would train nothing.")
    source = starting_option(module_options, dataset.class_names)
    weights = _local_weights(module_options, source)
    local = {f"data.{name}" for name in DATA_PATHS}
    local |= {f"model.{name}" for name in PLACES if _is_file(module_options.get(name))}
    return Training(
        name=file.stem,
        config=_without_paths(content),
        arguments=tuple(argument for argument in extra if argument.partition("=")[0].removeprefix("--") not in local),
        weights=weights,
        data=dataset,
        options=parsed,
        length=length,
        batch_size=data_options["batch_size"],
        gpus_wanted=_processes(trainer),
        backbone=module_options["backbone"],
        start=_start(module_options, source, weights),
        image_size=image_size,
        teraflops=teraflops,
        parameters=parameters,
        extras=_extras_of_transforms(data_options["transforms"]),
        fetched=_fetched(module_options, source, weights),
    )


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


def _refuse_secrets(options: Mapping[str, Any]) -> None:
    """Refuse passwords and signatures, which everyone who may describe the job would read in its parameters."""
    for name, value in flat(options).items():
        hidden = without_secrets(value)
        if hidden != value or lacks_secrets(value):
            raise Problem(
                f"--{name} {hidden}: everyone who may look at the job would see the password or query of this address; "
                "put the file into S3 and give s3://BUCKET/FILE, which the job reads with its role, or give a file of "
                "this machine, which is uploaded."
            )


def mean_size(data: CocoDataModule) -> tuple[int, int]:
    """Mean (height, width) of the training images as the model gets them, in pixels."""
    sizes = np.array(
        [resized_size(image.size, data.image_size, data.max_size) for image in data.train_set.annotations.images]
    )
    height, width = (max(32, round(float(side))) for side in sizes.mean(axis=0))
    return height, width


def forward_cost(model: dict[str, Any], data: CocoDataModule) -> tuple[float, int]:
    """(10^12 floating-point operations of a forward pass of one image of average size, trainable parameters).

    From a table for the published architecture; else counted on fake tensors, so that the pass needs neither memory nor
    time; the model is a real one, because some backbones read values while they are built. A multiply-add counts as two
    operations.
    """
    height, width = mean_size(data)
    module = DINOModule(num_classes=data.num_classes, **{k: v for k, v in model.items() if k != "num_classes"})
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    given = {name: tuple(value) if isinstance(value := model.get(name), list) else value for name in ARCHITECTURE}
    if all(value == _default(name) for name, value in given.items()):
        return (PUBLISHED_CONSTANT + PUBLISHED_PER_PIXEL * height * width), parameters
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


def _default(name: str) -> Any:
    """The default of an option of the model: that of the published DINO R50 4-scale."""
    return inspect.signature(DINO).parameters[name].default


def _existing_config(config: str) -> Path:
    if Path(config).is_file():
        return Path(config)
    try:
        return config_path(Path(config).name)
    except FileNotFoundError as error:
        raise Problem(f"--config: {config} does not exist.") from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Problem(f"--config: {file} is not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict) or not all(group is None or isinstance(group, dict) for group in _groups(content)):
        raise Problem(f"--config: {file} must contain the groups data, model and trainer, each with its options.")
    return content


def _groups(content: dict[str, Any]) -> list[Any]:
    return [content.get(name) for name in ("data", "model", "trainer")]


def _without_paths(content: dict[str, Any]) -> str:
    """The configuration without paths of this machine; in the container, the channels replace them."""
    for name in DATA_PATHS:
        (content.get("data") or {}).pop(name, None)
    model = content.get("model") or {}
    for name in PLACES:
        if _is_file(model.get(name)):
            del model[name]
    return str(yaml.safe_dump(content, sort_keys=False))


def _local_weights(model: dict[str, Any], source: str | None) -> dict[str, Path]:
    """The weights file on this machine that the run starts from, by option of `fit`; empty if there is none.

    Args:
        model: options of the module.
        source: the one of them that names the weights the run starts from.
    """
    if source is None:
        return {}
    weights = model[source]
    if _is_file(weights):
        return {f"model.{source}": Path(weights)}
    if source == "backbone_weights":
        return {}
    row = zoo().get(weights)
    if row is not None and (file := at_hand(row)) is not None:
        return {f"model.{source}": file}  # else the container fetches them
    if weights not in SHIPPED and row is None and not needs_download(weights):
        raise Problem(f"--model.{source}: {weights} does not exist.")
    return {}


def _fetched(model: Mapping[str, Any], source: str | None, local: Mapping[str, Path]) -> dict[str, str]:
    """The initial weights that neither lie on this machine nor come with the package, by option of `fit`."""
    if local or source is None or model[source] in SHIPPED:
        return {}
    return {f"model.{source}": model[source]}


def _start(model: dict[str, Any], source: str | None, local: Mapping[str, Path]) -> str:
    """Where the initial weights come from, in words."""
    if source is None:
        return "random"
    name = model[source]
    if local:
        return ", ".join(f"{path}, uploaded once" for path in local.values())
    if source == "backbone_weights":
        return f"of the backbone alone: {name}"
    if name in zoo():
        return f"{name}, fetched by the job; `python -m dino_lightning weights get {name}` first sends them along"
    return f"{name}, in the package" if name in SHIPPED else f"{name}, fetched by the job"


def _extras_of_transforms(transforms: Any) -> tuple[str, ...]:
    """The extras of the package that own transforms need.

    Raises:
        Problem: a transform of a package that the job does not have.
    """
    paths = list(class_paths(transforms))
    for path in paths:
        if path.partition(".")[0] not in KNOWN_PACKAGES:
            raise Problem(
                f"--data.transforms: {path} is of a package that the job does not have; a job can take transforms of "
                f"{', '.join(KNOWN_PACKAGES)}."
            )
    return ("albumentations",) if any(path.startswith("albumentations.") for path in paths) else ()


def _is_file(value: object) -> bool:
    return isinstance(value, str) and Path(value).is_file()


def _processes(trainer: dict[str, Any]) -> int:
    """The number of processes in a configuration; 1 where it sets none."""
    devices = trainer["devices"]
    if isinstance(devices, str) and "," in devices:  # "0,1" names two devices, "0," the first one alone
        devices = [part for part in devices.split(",") if part.strip()]
    elif isinstance(devices, str) and devices.strip().isdigit():
        devices = int(devices)
    count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1
    return int(count * trainer["num_nodes"])
