"""Errors that the user can correct; each message is one sentence, which a command prints without a traceback."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MESSAGE = 1400  # characters
FROM_A_LOADER = "\nOriginal Traceback "  # how PyTorch begins what happened in a loader process


class UserError(Exception):
    """Something that the user can correct: which file or option, what is wrong with it, what to do."""


class UsageError(UserError, ValueError):
    """A command line that cannot be carried out."""


class DataError(UserError, ValueError):
    """Something is wrong with the dataset; the message says which file, which entry, and what to do.

    File names in it may be hostile or endless: the message is kept on one line, without control characters, and cut in
    the middle where it is long. PyTorch raises the error of a loader process anew, with the traceback there for
    its message: of this the last line is kept, which is the message.
    """

    def __init__(self, message: str) -> None:
        if FROM_A_LOADER in message:
            message = message.strip().splitlines()[-1].partition(": ")[2]
        line = "".join(" " if char.isspace() else char if char.isprintable() else "?" for char in message)
        if len(line) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            line = f"{line[:half]} ... {line[-half:]}"
        super().__init__(line)


class CheckpointError(UserError, ValueError):
    """A checkpoint or weights file that cannot be used; the message says why and what to do."""


class NonFiniteError(UserError, RuntimeError):
    """The model's outputs contain NaN or infinity; `image_ids` are the images concerned."""

    def __init__(self, image_ids: Sequence[int], more: str = "") -> None:
        super().__init__(
            f"The model's predictions for image ids {list(image_ids)} are not finite numbers. Lower the learning rate, "
            f"use float32 or bf16 instead of float16, and check these images and their boxes.{more}"
        )
        self.image_ids = list(image_ids)


class OutOfMemory(UserError, RuntimeError):
    """A step that did not fit into memory; the message says how large it was and what helps."""
