"""Options whose value is a class and its arguments: what the parser says against one, in one sentence."""

from __future__ import annotations

import importlib
import inspect
import re

# What the user does not give: the instance, and what Lightning passes to optimizers and schedules.
PASSED = ("self", "params", "optimizer")
KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null",
    "list": "a list", "dict": "a mapping",
}  # fmt: skip


def kind(name: str) -> str:
    """A Python type in words."""
    return KINDS.get(name, name)


def explain_class_error(message: str) -> str | None:
    """The sentence about a class or its arguments; None for a complaint about something else.

    Args:
        message: the parser's, in one line; it lists what is wrong with the value for each type that it may have, of
            which the first is about the class that the user named.
    """
    key = re.match(r'Parser key "([\w.]+)": ', message)
    if key is None:
        return None
    option, given = key[1], message.rpartition(" Given value: ")[2]
    problem = re.search(r"Problem with given class_path '([\w.]+)': (.*)", message)
    unknown = re.search(r"Expected a dot import path string: ([\w.]+)", message)
    if problem is None:
        return None if unknown is None else _no_class(option, unknown[1])
    path, what = problem[1], problem[2]
    name = path.rpartition(".")[2]
    if "init_args" in given and "class_path" not in given:
        return f"--{option} has init_args and no class: name it as class_path."
    if required := re.match(r"the following arguments are required: (\w+(?:, \w+)*)", what):
        names = required[1].split(", ")
        values = ", ".join(f"{each}: ..." for each in names)
        words = "" if "[" in given else f", or on the command line as --{option}.{names[0]} VALUE"
        return f"--{option}: {name} needs {' and '.join(names)}; give it in YAML as init_args: {{{values}}}{words}."
    if refused := re.match(r"Option '(\w+)' is not accepted", what):
        valid = _arguments(path)
        listed = f"; its arguments are {', '.join(valid)}" if valid else ""
        return f"--{option}: {name} has no argument {refused[1]}{listed}."
    if wrong := re.match(r'Parser key "(\w+)": (.*?)(?:Got value|Given value): (.*?)(?= - |$)', what):
        wanted = " or ".join(dict.fromkeys(kind(each) for each in re.findall(r"<class '(\w+)'>", wrong[2])))
        return f"--{option}: {wrong[1]} of {name} is {wrong[3]}; it must be {wanted}." if wanted else None
    return None


def _no_class(option: str, name: str) -> str:
    where = {"optimizer": "torch.optim", "lr_scheduler": "torch.optim.lr_scheduler"}.get(option)
    known = "" if where is None else f"the name of one in {where}, or "
    return f"--{option} {name}: there is no such class; give {known}its whole path (package.module.Class)."


def _arguments(path: str) -> list[str]:
    """The names of the arguments of a class, as far as they can be told."""
    module, _, name = path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in named and each.name not in PASSED]
