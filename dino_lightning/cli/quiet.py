"""What a user of the command line need not read: advertisements, and what Lightning warns of in its own code."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dino_lightning.cli.command import plain_warnings

RANK_ZERO_LOG = "lightning.pytorch.utilities.rank_zero"  # the logger of Lightning's messages

# Regular expressions for the beginnings of log messages to leave out.
LOG_MESSAGES = (
    r".*\[litlogger\]",  # an advertisement
    r"TPU available: False",
    r"\s*Detected KeyboardInterrupt, attempting graceful shutdown",  # `run_command` says it in its own sentence
    r"`weights_only` was not set",  # of saving: the optimizer is wanted too, and always was
)
# For the beginnings of warnings about what a user cannot change, or what the command line does on purpose.
ALWAYS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own code
    r"Found \d+ module\(s\) in eval mode at the start of training",  # model.freeze
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # options may be left out
    r"Grad strides do not match bucket view strides",  # DDP with channels-last images
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # the table has each epoch
    r"Glyph \d+ .*missing from",  # class and file names in letters that matplotlib's font lacks
    # A folder with a run in it is refused, and a resumed run keeps its metrics: its lock alone is there, or its own.
    r"Checkpoint directory .* exists and is not empty",
    r"Experiment logs directory .* exists and is not empty",
)
# Evaluation saves no checkpoints, so it needs no earlier best score.
IN_EVALUATION = (r"The dirpath has changed from",)


@contextmanager
def quiet(subcommand: str) -> Iterator[None]:
    """Leave these messages out inside, and print every other warning as one line that begins with `warning:`.

    Args:
        subcommand: `fit`, `validate` or `test`.
    """
    ignored = list(ALWAYS)
    if subcommand != "fit":
        ignored += IN_EVALUATION
    log = logging.getLogger(RANK_ZERO_LOG)
    log.addFilter(_is_wanted)
    try:
        with plain_warnings(), warnings.catch_warnings():
            for beginning in ignored:
                warnings.filterwarnings("ignore", message=beginning)
            yield
    finally:
        log.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(re.match(beginning, message) for beginning in LOG_MESSAGES)
