"""The training: configuration and dataset, checked on the laptop as `fit` checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dino_lightning.cli.command import expected_errors, explain
from dino_lightning.cli.config_files import absent_config, config_path
from dino_lightning.data.class_paths import KNOWN_PACKAGES, class_paths
from dino_lightning.weights.places import PLACES, needs_download, starting_option
from dino_lightning.weights.shipped import SHIPPED
from dino_lightning.weights.zoo import at_hand, zoo
from sagemaker_entry.laptop.checked import Checked, DatasetOnDisk
from sagemaker_entry.laptop.length import Length, length_of
from sagemaker_entry.laptop.plain_checks import checked_plainly
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:
    from dino_lightning import CocoDataModule

DATA_PATHS = (
    "root", "train_annotations", "train_images", "val_annotations", "val_images", "test_annotations", "test_images",
)  # fmt: skip


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
    data: CocoDataModule | DatasetOnDisk
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
        checked = _checked(["--config", str(file), *extra, *given])
    except expected_errors() as error:
        raise Problem(explain(error)) from error
    except (ValueError, TypeError) as error:
        raise Problem(str(error)) from error
    parsed, dataset = checked.options, checked.data
    module_options, data_options, trainer = parsed["model"], parsed["data"], parsed["trainer"]
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
        image_size=checked.image_size,
        teraflops=checked.teraflops,
        parameters=checked.parameters,
        extras=_extras_of_transforms(data_options["transforms"]),
        fetched=_fetched(module_options, source, weights),
    )


def _checked(arguments: Sequence[str]) -> Checked:
    """All checks that `fit` makes; those of an ordinary training, all of whose values are right, without PyTorch."""
    checked = checked_plainly(arguments)
    if checked is None:
        from sagemaker_entry.laptop.fit_checks import checked_by_fit  # imports PyTorch and Lightning: seconds

        checked = checked_by_fit(arguments)
    return checked


def _existing_config(config: str) -> Path:
    if Path(config).is_file():
        return Path(config)
    try:
        return config_path(Path(config).name)
    except FileNotFoundError as error:
        raise Problem(absent_config(config)) from error


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
