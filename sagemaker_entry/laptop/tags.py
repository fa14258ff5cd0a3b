"""The user's tags for cost allocation, within AWS's limits: of jobs, and of whatever else is created for the user."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from sagemaker_entry.protocol.problem import Problem

LONGEST_KEY, LONGEST_VALUE = 128, 256  # characters
MOST_TAGS = 50  # on one resource, with those of the launcher
MARKS = "_.:/=+-@"
TAKEN = ("config", "run", "dollars-per-hour", "resumes")  # keys that the launcher reads again itself
TRAINED_BY = "trained-by"  # of endpoints and transforms: the job of their model
OWN_TAGS = len(TAKEN) + 1  # and "project", which a user may set


def user_tags(texts: Sequence[str]) -> dict[str, str]:
    """The tags in the values of --tags, key to value.

    Args:
        texts: each is KEY=VALUE, or several of them with commas between.

    Raises:
        Problem: AWS would refuse a tag, or the launcher uses its key.
    """
    tags: dict[str, str] = {}
    for entry in (part.strip() for text in texts for part in text.split(",")):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or not key:
            raise Problem(f"--tags: {entry!r} is no tag; write KEY=VALUE, such as team=vision,cost-center=42.")
        _check(key, value)
        if tags.setdefault(key, value) != value:
            raise Problem(f"--tags: {key} is given twice, as {tags[key]!r} and as {value!r}.")
    if len(tags) > MOST_TAGS - OWN_TAGS:
        raise Problem(
            f"--tags: {len(tags)} tags are too many; AWS takes {MOST_TAGS}, of which a job needs {OWN_TAGS} itself."
        )
    return tags


def tags_of_serving(job: str, of_job: Sequence[Mapping[str, str]], texts: Sequence[str]) -> dict[str, str]:
    """The tags of an endpoint or a transform: the user's of the training job, and those of --tags, which win.

    Args:
        job: the name of the training job.
        of_job: its tags, as AWS lists them.
        texts: the values of --tags.

    Raises:
        Problem: as `user_tags`, or together they are more than AWS takes.
    """
    kept = {tag["Key"]: tag["Value"] for tag in of_job}
    kept = {key: value for key, value in kept.items() if key not in TAKEN and not key.lower().startswith("aws:")}
    tags = {"project": "dino-lightning", **kept, **user_tags(texts), TRAINED_BY: tag_value(job)}
    if len(tags) > MOST_TAGS:
        raise Problem(f"--tags: with those of {job} they are {len(tags)} tags; AWS takes {MOST_TAGS}, so give fewer.")
    return tags


def tag_value(text: str) -> str:
    """A text of the launcher, such as a file's name, as the value of a tag: what AWS does not take becomes a hyphen."""
    return "".join(char if _taken(char) else "-" for char in text)[:LONGEST_VALUE]


def _taken(char: str) -> bool:
    """Whether AWS takes a character in tags: letters, spaces and digits of any script, and some marks."""
    return unicodedata.category(char)[0] in "LNZ" or char in MARKS


def _check(key: str, value: str) -> None:
    """Refuse what AWS would refuse, and what would change the meaning of the launcher's own tags."""
    if key.lower().startswith("aws:"):
        raise Problem(f"--tags: {key} begins with aws:, which AWS keeps for itself.")
    if key in (*TAKEN, TRAINED_BY):
        raise Problem(f"--tags: {key} is a tag that launch sets and reads itself; choose another key.")
    for name, text, most in (("key", key, LONGEST_KEY), ("value", value, LONGEST_VALUE)):
        if len(text) > most:
            raise Problem(f"--tags: the {name} {text[:20]}... has {len(text)} characters; AWS takes {most} at most.")
        wrong = sorted({char for char in text if not _taken(char)})
        if wrong:
            raise Problem(
                f"--tags: the {name} {text!r} has {' '.join(wrong)}; AWS takes letters, digits, spaces and {MARKS}."
            )
