"""The format of progress lines: printed in the container, read by SageMaker's metric graphs and by `launch`.

    [dino] epoch=3 epochs=50 finished train_loss=8.1250 val_loss=7.5000 val_AP=0.4123 best_AP=0.4200

Jobs that run already carry the regular expressions that they were started with: the format must not change.
"""

from __future__ import annotations

import re

PREFIX = "[dino]"

# Name in the SageMaker console -> name in a progress line.
METRICS = {
    "train:loss": "train_loss",
    "val:loss": "val_loss",
    "val:AP": "val_AP",
    "val:AP50": "val_AP50",
    "val:F1": "val_F1",
    "best:AP": "best_AP",  # of all evaluations so far, so that the job's final metrics tell its best ones
    "best:F1": "best_F1",
    "epoch": "epoch",
}


def metric_regex(word: str) -> str:
    """The regular expression that finds a metric in a progress line; its group is the value."""
    return rf"\{PREFIX[:-1]}\] .*\b{word}=([0-9.eE+-]+)"


def read_metrics(line: str) -> dict[str, float]:
    """The metrics in a progress line, name to value; an empty dict for any other line."""
    if PREFIX not in line:
        return {}
    found = {word: re.search(metric_regex(word), line) for word in (*METRICS.values(), "epochs")}
    return {word: float(match[1]) for word, match in found.items() if match}
