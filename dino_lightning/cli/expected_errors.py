"""Errors that are the user's to mend, and the one sentence that each of them gets."""

from __future__ import annotations

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dino_lightning.cli.arguments import explain_argument_error
from dino_lightning.errors import CheckpointError, DataError, NonFiniteError, OutOfMemory, UsageError

EXPECTED_ERRORS = (
    *(ArgumentError, UsageError, DataError, CheckpointError, NonFiniteError, OutOfMemory),
    MisconfigurationException,
)


def explain(error: BaseException) -> str:
    """What went wrong, in one sentence for the user."""
    return explain_argument_error(str(error)) if isinstance(error, ArgumentError) else original_message(error)


def original_message(error: BaseException) -> str:
    """The message of an error, without the traceback that a loader process wraps round it."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message
