"""The options of `fit`, parsed without PyTorch and Lightning, whose import takes seconds.

`fit_options.json` has the names, types and defaults that Lightning's parser has; `python -m
dino_lightning.cli.help_pages` writes it, and a test holds it current. Whoever needs a sentence about what is wrong, or
has options that are objects in Python, asks the real parser: here there is an exact answer or none.
"""

from __future__ import annotations

import argparse
import collections.abc
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from dino_lightning.cli.config_files import with_packaged_configs
from dino_lightning.cli.option_checks import check_options
from dino_lightning.cli.options_of_weights import with_options_of_weights

FILE = Path(__file__).with_name("fit_options.json")
ONLY_ON_COMMAND_LINE = ("run_dir", "overwrite")  # they are needed before a configuration file is read
GROUPS = ("data", "model", "trainer")
OBJECT = "object"  # stands for all types that are classes of PyTorch and Lightning
WORD = re.compile("[a-z0-9_]+")  # a text that the real parser takes for no name of a class
_GENERIC: dict[str, Any] = {
    "list[int]": list[int],
    "list[str]": list[str],
    "list[dict]": list[dict],  # type: ignore[type-arg]  # as it is written there
    "dict[str, int]": dict[str, int],
    "dict[str, str]": dict[str, str],
    "dict[str, list[str]]": dict[str, list[str]],
    "dict[str, Any]": dict[str, Any],
    "Sequence[int]": collections.abc.Sequence[int],
}
_SIMPLE: dict[str, Any] = {kind.__name__: kind for kind in (bool, int, float, str, Path, timedelta)}
TYPES = {**_SIMPLE, **_GENERIC, "null": type(None)}


def parsed_plainly(args: Sequence[str]) -> dict[str, Any] | None:
    """What `lightning_cli.parse_fit` gives for arguments, or None where only that can tell.

    None for whatever is wrong, for options that are objects, and with a Lightning whose Trainer has other options than
    the one that the list was made with.

    Args:
        args: of `fit`, each as --name=value, or as --config and a file.
    """
    listed = json.loads(FILE.read_text(encoding="utf-8"))
    if listed["trainer"] != trainer_signature():
        return None
    try:
        given = with_packaged_configs(args)
        if not all(_has_plain_groups(value) for option, value in pairwise(given) if option == "--config"):
            return None
        options = _parser(listed["options"]).parse_args(with_options_of_weights(given))
        check_options(options)
    except Exception:  # of as many kinds as there are mistakes; the real parser says what is wrong
        return None
    found: dict[str, Any] = options.as_dict()
    if any(found[name] for name in ONLY_ON_COMMAND_LINE) or found["data"]["root"] is None:
        return None
    for name, (types, _) in listed["options"].items():
        group, _, inner = name.rpartition(".")
        value = (found[group] if group else found)[inner]
        if OBJECT in types and isinstance(value, str) and not WORD.fullmatch(value):
            return None
    return found


def _has_plain_groups(file: str) -> bool:
    """Whether every group in a configuration file has options: the parsers differ about a line such as `model:`."""
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    return isinstance(content, dict) and all(isinstance(content.get(name, {}), dict) for name in GROUPS)


def _parser(listed: dict[str, tuple[list[Any], Any]]) -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]  # public, as Lightning has it

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile)
    for name, (types, default) in listed.items():
        kinds = tuple(_type_of(each) for each in types if each != OBJECT)
        default = tuple(default) if isinstance(default, list) else default  # JSON has no tuples
        parser.add_argument(f"--{name}", type=Union[kinds], default=default)  # noqa: UP007 - of a tuple
    return parser


def _type_of(described: Any) -> Any:
    from jsonargparse.typing import PositiveInt

    if isinstance(described, list):
        return Literal[tuple(described)]
    return PositiveInt if described == PositiveInt.__name__ else TYPES[described]


def trainer_signature() -> str | None:
    """A digest of what Lightning's Trainer takes, from its source; None where that is not found."""
    found = find_spec("lightning")
    if found is None or not found.submodule_search_locations:
        return None
    try:
        source = Path(found.submodule_search_locations[0], "pytorch", "trainer", "trainer.py").read_text("utf-8")
    except OSError:
        return None
    taken = [re.search(rf"    def {name}\((.*?)\) -> None:", source, re.DOTALL) for name in ("__init__", "fit")]
    text = "".join(match[1] for match in taken if match is not None)
    return hashlib.sha256(re.sub(r"\s+", "", text).encode()).hexdigest()[:16]


def listing(actions: Iterable[argparse.Action], of_lightning: Iterable[str]) -> str:
    """The content of `fit_options.json`.

    Args:
        actions: of the real parser, without those that the data settles.
        of_lightning: further options that Lightning adds, objects and paths that nobody launches a job with.
    """
    options = {}
    for action in actions:
        types = _described(getattr(action, "_typehint", None) or action.type)
        options[action.dest] = [types, json.loads(json.dumps(action.default))]
    options |= {name: [["null", OBJECT], None] for name in of_lightning}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(described)}" for name, described in options.items())
    return f'{{"trainer": {json.dumps(trainer_signature())}, "options": {{\n{lines}\n}}}}\n'


def _described(kind: Any) -> list[Any]:
    """A type as the file has it: its alternatives, each a name of `TYPES`, or a list of the values of a literal."""
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        parts = [each for part in get_args(kind) for each in _described(part)]
        return [each for index, each in enumerate(parts) if each not in parts[:index]]
    if get_origin(kind) is Literal:
        return [list(get_args(kind))]
    names = [name for name, known in TYPES.items() if known == kind]
    return names or [kind.__name__ if kind.__name__ == "PositiveInt" else OBJECT]
