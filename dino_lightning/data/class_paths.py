"""Transforms made from class paths and arguments, as configuration files give them."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

FIRST_OLD = "torchvision.transforms."  # the older transforms, which know no boxes
KNOWN_PACKAGES = ("torchvision", "albumentations", "dino_lightning")
NO_ARGUMENT = "are not valid for transform"  # albumentations warns of wrong names, and ignores them


def built(given: Any) -> Any:
    """A value of a configuration with every `class_path` in it, at any depth, made into an object.

    Args:
        given: mappings, lists and plain values; a mapping with `class_path` stands for an object, made with the
            arguments in its `init_args`. What is an object already stays as it is.

    Raises:
        ValueError: no such class, one that is no transform, or arguments that it does not take.
    """
    if isinstance(given, list | tuple):
        return [built(entry) for entry in given]
    if not isinstance(given, Mapping):
        return given
    if "class_path" not in given:
        return {name: built(value) for name, value in given.items()}
    path, arguments = given["class_path"], given.get("init_args") or {}
    unknown = [str(name) for name in given if name not in ("class_path", "init_args")]
    if unknown:
        raise ValueError(f"transforms: {path} has {', '.join(unknown)}; arguments of a transform go into init_args.")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"transforms: init_args of {path} is {arguments!r}; it must give values by name.")
    return _made(_transform_class(path), path, {str(name): built(value) for name, value in arguments.items()})


def class_paths(given: Any) -> Iterator[str]:
    """Every `class_path` in a value of a configuration, at any depth."""
    if isinstance(given, Mapping):
        if isinstance(given.get("class_path"), str):
            yield given["class_path"]
        given = list(given.values())
    if isinstance(given, list | tuple):
        for entry in given:
            yield from class_paths(entry)


def transform_types() -> tuple[type, ...]:
    """The base classes of transforms; those of albumentations only where it is installed and in use."""
    from torchvision.transforms import v2  # takes seconds; finding class paths needs none of it

    albumentations = albumentations_in_use()
    more = () if albumentations is None else (albumentations.BasicTransform, albumentations.BaseCompose)
    return (v2.Transform, *more)


def albumentations_in_use() -> Any:
    """The package albumentations if something has imported it, as whatever made its transforms has; else None."""
    return sys.modules.get("albumentations")


def _transform_class(path: object) -> type:
    if not isinstance(path, str) or "." not in path:
        raise ValueError(f"transforms: class_path is {path!r}; give package.module.Class.")
    module_name, _, name = path.rpartition(".")
    # it would ask the network for newer versions while it is imported
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:  # importing runs the code of the module
        package = path.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        hint = (
            f" Install it: pip install 'dino-lightning[{package}]'." if package == "albumentations" and absent else ""
        )
        raise ValueError(f"transforms: {path} cannot be imported ({error}).{hint}") from error
    if found is None:
        raise ValueError(f"transforms: there is no {name} in {module_name}.")
    if not isinstance(found, type) or not issubclass(found, transform_types()):
        from torchvision.transforms import v2

        old = path.startswith(FIRST_OLD) and not path.startswith(f"{FIRST_OLD}v2.") and hasattr(v2, name)
        hint = f" Take torchvision.transforms.v2.{name}." if old else ""
        raise ValueError(
            f"transforms: {path} is no transform of torchvision.transforms.v2 or of albumentations, nor made from one."
            + hint
        )
    return found


def _made(kind: type, path: str, arguments: dict[str, Any]) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = kind(**arguments)
        except Exception as error:  # whatever the class checks its arguments with
            raise ValueError(f"transforms: {path} refuses its arguments: {' '.join(str(error).split())}.") from error
    for warning in caught:
        if NO_ARGUMENT in str(warning.message):
            raise ValueError(f"transforms: {path} refuses its arguments: {warning.message}.")
        warnings.warn(warning.message, warning.category, stacklevel=2)
    return made
