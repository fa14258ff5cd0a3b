"""How the launcher is called, and where it puts things in S3."""

from __future__ import annotations

COMMAND = "python -m sagemaker_entry.launch"
PREFIX = "dino-lightning"  # the folder of the bucket that all of it lies in
RUNS = f"{PREFIX}/runs/"  # a folder for each run: config, checkpoints, output
TRIALS = f"{PREFIX}/trials"  # what trials have measured: a folder by what was measured, in it one for each trial
JOB_NAMES = "dino-"  # how the names of jobs begin
