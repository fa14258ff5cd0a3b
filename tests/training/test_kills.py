"""Runs that are killed again and again, anywhere, end as if nothing had happened."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
import torch

from dino_lightning.floor_plans import write_rooms_dataset
from tests.conftest import TINY_ARGS

PATIENCE = 240  # seconds for a process to show that it trains, on a loaded machine


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return write_rooms_dataset(tmp_path_factory.mktemp("kills") / "plans", num_train=24, num_val=4, size=160)


def options(plans, processes):
    own = ["--data.root", str(plans), "--trainer.log_every_n_steps=1", "--save_every_steps=3", "--trainer.max_epochs=6"]
    if processes > 1:
        own += [f"--trainer.devices={processes}", "--trainer.strategy=ddp", "--trainer.max_epochs=8"]
    return [*TINY_ARGS, *own, "--data.batch_size=2"]


def start(run, arguments, tmp_path):
    log = (tmp_path / f"{run.name}.log").open("a")
    command = [sys.executable, "-m", "dino_lightning.fit", "--run_dir", str(run), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment, start_new_session=True)


def logged_metrics(run):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [
        ((row["step"], name), float(value))
        for row in rows
        for name, value in row.items()
        if value and name not in ("step", "epoch")  # of every row, and a step has several
    ]
    metrics = dict(found)
    assert len(metrics) == len(found), "a metric of a step is there twice"
    return metrics


def wait_for(condition, process):
    """Until something is so, or the process has ended."""
    limit = time.monotonic() + PATIENCE
    while process.poll() is None and not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.01)


def training_processes(process):
    """Of a run, by rank; those of loaders there are none."""
    parent = psutil.Process(process.pid)
    return [parent, *(child for child in parent.children() if "dino_lightning.fit" in _command(child))]


def _command(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has just ended, and may not have been waited for yet
        return []


def kill(process, victim, run, when, rng, life):
    """SIGKILL at a random moment: of the whole life of the process, of its training, or while a checkpoint is written.

    Gives what the process was doing, or None where it ended before.
    """
    saved = run / "checkpoints" / "last.ckpt"
    before = saved.stat().st_mtime_ns if saved.exists() else 0

    def saved_anew():
        return saved.exists() and saved.stat().st_mtime_ns != before

    if when == "ever":  # importing, reading data, resuming, before the first checkpoint: wherever it is by then
        moment = time.monotonic() + rng.uniform(0, life)
        wait_for(lambda: time.monotonic() > moment, process)
    else:
        wait_for(saved_anew, process)
    if when == "writing":
        wait_for(lambda: any((run / "checkpoints").glob("tmp*")), process)
    elif when == "training":
        time.sleep(rng.uniform(0, 1.5))
    if process.poll() is not None:
        return None
    stage = "training" if saved_anew() else "resuming" if before else "starting"
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        processes = training_processes(process)
        processes[min(victim, len(processes) - 1)].kill()
    started = time.monotonic()
    process.wait(timeout=60)
    for left in psutil.process_iter():  # whoever is left of a run must go, too
        try:
            if str(run) in left.cmdline():
                left.wait(timeout=max(1, 60 - (time.monotonic() - started)))
        except psutil.NoSuchProcess:
            continue
    return stage


def run_with_kills(run, plans, tmp_path, rng, processes, wanted, life):
    """Train to the end, killed up to `wanted` times; what it was doing each time."""
    stages = []
    arguments = options(plans, processes)
    while True:
        resume = (run / "checkpoints" / "last.ckpt").exists()
        process = start(run, ["--ckpt_path", "last"] if resume else ["--overwrite", *arguments], tmp_path)
        if len(stages) < wanted:
            victim = "all" if processes == 1 else rng.choice([0, 1])
            if stage := kill(process, victim, run, rng.choice(["writing", "training", "ever", "ever"]), rng, life):
                stages.append(stage)
                continue
        assert process.wait(timeout=600) == 0, (tmp_path / f"{run.name}.log").read_text()[-3000:]
        return stages


def check_equal(run, other):
    expected, got = logged_metrics(run), logged_metrics(other)
    assert got == expected
    states = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, other)]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "wanted", "seed"), [(1, 22, 0), (2, 10, 1)])
def test_killed_runs_end_like_those_that_were_not(plans, tmp_path, processes, wanted, seed):
    rng = random.Random(seed)
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert start(whole, options(plans, processes), tmp_path).wait(timeout=600) == 0
    life = time.monotonic() - began
    stages, number = [], 0
    while len(stages) < wanted:
        number += 1
        run = tmp_path / f"killed{number}"
        stages += run_with_kills(run, plans, tmp_path, rng, processes, wanted - len(stages), life)
        check_equal(whole, run)
    print(f"killed {len(stages)} times in {number} runs: {sorted(Counter(stages).items())}")
    assert not list((run / "checkpoints").glob("*.link"))
