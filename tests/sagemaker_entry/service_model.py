"""Requests against botocore's model of a service: names and types, and the patterns, lengths and enumerations too."""

import functools
import re
import sys
import unicodedata

import botocore.session
from botocore.validate import ParamValidator

CLASS = re.compile(r"\\p\{(\w)\}")  # a major category of Unicode, which Python's expressions lack


@functools.cache
def members(category):
    """How to write \\p{category} within the brackets of an expression: ranges of all characters of the category."""
    ranges, first = [], None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and unicodedata.category(chr(code)).startswith(category)
        if inside and first is None:
            first = code
        elif not inside and first is not None:
            ranges.append(f"{re.escape(chr(first))}-{re.escape(chr(code - 1))}")
            first = None
    return "".join(ranges)


@functools.cache
def expression(pattern):
    """A pattern of AWS's as an expression of Python's."""
    return re.compile(CLASS.sub(lambda found: members(found[1]), pattern), re.DOTALL)


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
    if shape.type_name == "string" and not expression(about.get("pattern", ".*")).fullmatch(value):
        yield f"{place}: {value!r} does not match {about['pattern']}"
