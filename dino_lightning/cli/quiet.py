"""What a user of the command line need not read: advertisements, and what Lightning warns of in its own code."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dino_lightning.cli.command import plain_warnings
from dino_lightning.training.module import DINOModule

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


def parameter_line(module: DINOModule) -> str:
    """The size of the model in one line, in place of Lightning's table."""
    total = sum(parameter.numel() for parameter in module.model.parameters())
    trainable = sum(parameter.numel() for parameter in module.model.parameters() if parameter.requires_grad)
    return f"DINO: {total / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M trainable"


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Three metrics a line, in place of Lightning's table; those of single classes are left out.

    Args:
        metrics: numbers by name; -1 stands for nothing to measure and is shown as a dash.
    """
    names = [name for name in metrics if name.partition("/dataloader_idx_")[0].count("/") == 1]
    width = max((18, *(len(name) + 1 for name in names)))
    cells = [
        f"{name:<{width}}{'-' if float(metrics[name]) == -1 else f'{float(metrics[name]):.3f}':>6}" for name in names
    ]
    return "\n".join("  ".join(cells[start : start + 3]) for start in range(0, len(cells), 3))


def _is_wanted(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(re.match(beginning, message) for beginning in LOG_MESSAGES)
