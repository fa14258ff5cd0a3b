"""Memory of freed tensors that is kept for the next step."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import resource, torch
from dino_lightning.training.freed_memory import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(size << 20) for size in (12, 16, 10)]  # 48, 64 and 40 MB
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults_of_a_step()
before, kept = min(faults_of_a_step() for _ in range(3)), keep_freed_memory()
for _ in range(4):
    faults_of_a_step()
print(before, kept, min(faults_of_a_step() for _ in range(4)))
"""


def _run(**environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_a_step_takes_the_memory_of_the_one_before() -> None:
    before, kept, after = _run()
    assert kept == str(sys.platform.startswith("linux"))  # the tests run with glibc
    # A block does not always fit where one of the step before was, so that not every step takes nothing.
    assert kept == "False" or int(after) < int(before) / 2


def test_choices_of_the_environment_stay() -> None:
    assert _run(MALLOC_ARENA_MAX="2")[1] == "False"
