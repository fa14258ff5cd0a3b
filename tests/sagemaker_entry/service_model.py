"""Requests against botocore's model of a service: names and types, and the patterns, lengths and enumerations too."""

import functools
import re

import botocore.session
from botocore.validate import ParamValidator

CLASSES = {r"\p{L}": "a-zA-Z", r"\p{Z}": " ", r"\p{N}": "0-9"}  # which Python's expressions lack


@functools.cache
def _model(service):
    return botocore.session.get_session().get_service_model(service)


def violations(operation, request, service="sagemaker"):
    """What AWS would refuse in a request by its form, one line each."""
    shape = _model(service).operation_model(operation).input_shape
    report = ParamValidator().validate(request, shape)
    return [report.generate_report()] if report.has_errors() else list(_of(request, shape, ""))


def _of(value, shape, place):
    if shape.type_name == "structure":
        for name, inner in value.items():
            yield from _of(inner, shape.members[name], f"{place}.{name}")
        return
    if shape.type_name == "list":
        for index, inner in enumerate(value):
            yield from _of(inner, shape.member, f"{place}[{index}]")
    if shape.type_name == "map":
        for key, inner in value.items():
            yield from _of(key, shape.key, f"{place}.{key}")
            yield from _of(inner, shape.value, f"{place}.{key}")
    about = shape.metadata
    size = value if shape.type_name in ("integer", "long", "float") else len(value) if hasattr(value, "__len__") else 0
    if not about.get("min", size) <= size <= about.get("max", size):
        yield f"{place}: {value!r} is not within {about.get('min')} to {about.get('max')}"
    if "enum" in about and value not in about["enum"]:
        yield f"{place}: {value!r} is none of {about['enum'][:8]}"
    pattern = about.get("pattern", ".*")
    for unknown, known in CLASSES.items():
        pattern = pattern.replace(unknown, known)
    if shape.type_name == "string" and not re.fullmatch(pattern, value, re.DOTALL):
        yield f"{place}: {value!r} does not match {pattern}"
