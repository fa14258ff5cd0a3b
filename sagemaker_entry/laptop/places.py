"""Where the launcher puts things in S3."""

from __future__ import annotations

PREFIX = "dino-lightning"  # the folder of the bucket that all of it lies in
RUNS = f"{PREFIX}/runs/"  # a folder for each run: config, checkpoints, output
JOB_NAMES = "dino-"  # how the names of jobs begin
