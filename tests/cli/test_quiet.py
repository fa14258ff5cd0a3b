"""What the command line prints of Lightning's messages and of warnings."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from dino_lightning.cli.quiet import RANK_ZERO_LOG, quiet
from dino_lightning.cli.results import metrics_table
from tests.conftest import TINY_ARGS

NOT_PRINTED = (
    "litlogger",
    "LeafSpec",
    "FLOPs",
    "module.py",
    ".py:",
    "TPU",
    "┃",
    "\r",
    "dirpath has changed",
    "not empty",
    "logging interval",
)


def printed(command, *args, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "dino_lightning", command, *args],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for noise in NOT_PRINTED:
        assert noise not in done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
def test_training_resuming_and_validating_print_what_concerns_the_user(rooms, tmp_path):
    args = [arg for arg in TINY_ARGS if "progress_bar" not in arg]
    out, error = printed(
        "fit", "--data.root", str(rooms), "--run_dir=run", "--trainer.max_epochs=1", *args, cwd=tmp_path
    )
    assert "DINO: 1.3 M parameters, 1.3 M trainable" in out
    advice = [line for line in error.splitlines() if line.startswith("warning: Training from scratch on 8 images: ")]
    assert len(advice) == 1
    printed("fit", "--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_epochs=2", cwd=tmp_path)
    out, _ = printed("validate", "--ckpt_path=run/checkpoints/last.ckpt", cwd=tmp_path)
    assert out.count("val/AP50") == 1


def test_only_what_is_named_is_left_out(caplog):
    log = logging.getLogger(RANK_ZERO_LOG)
    with caplog.at_level("INFO"), quiet("fit"):
        log.info("💡 Tip: For seamless cloud logging, try installing [litlogger](https://example.org/litlogger/)")
        log.info("TPU available: False, using: 0 TPU cores")
        log.info("GPU available: True, used: True")
    assert caplog.messages == ["GPU available: True, used: True"]
    assert not log.filters


@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_a_folder_that_holds_a_lock_and_a_short_epoch_are_not_warned_about(subcommand):
    """A folder that holds another run is refused before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet(subcommand):
            warnings.warn("Checkpoint directory /run/checkpoints exists and is not empty.", stacklevel=1)
            warnings.warn("Experiment logs directory /run exists and is not empty.", stacklevel=1)
            warnings.warn("The number of training batches (6) is smaller than the logging interval T", stacklevel=1)
            warnings.warn("Something else is not empty.", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["Something else is not empty."]


def test_warnings_are_one_line_inside_and_as_before_outside():
    before = warnings.formatwarning
    with quiet("fit"):
        line = warnings.formatwarning(UserWarning("Step 3 is left out:\n  why"), UserWarning, "module.py", 165)
        assert line == "warning: Step 3 is left out: why\n"
    assert warnings.formatwarning is before


def test_metrics_are_three_a_line_without_those_of_single_classes():
    table = metrics_table({"val/AP": 0.5, "val/AP_small": -1.0, "val/AP_class/door": 0.1, "val/F1": 0.25, "val/AR": 1})
    assert [line.split() for line in table.splitlines()] == [
        ["val/AP", "0.500", "val/AP_small", "-", "val/F1", "0.250"],
        ["val/AR", "1.000"],
    ]
