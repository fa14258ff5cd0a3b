"""Kills runs again and again, anywhere; `python -m tests.training.kills PROCESSES KILLS [SEED]` tries many.

However often a run is killed, it must end as one that never was.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from dino_lightning.floor_plans import write_rooms_dataset
from tests.conftest import TINY_ARGS

PATIENCE = 240  # seconds for a process to show that it trains, on a loaded machine
MOMENTS = ("starting", "starting", "training", "evaluating", "writing", "ever")

# A callback as a user may have one: it tells from outside what the first process is doing.
STAGES = """
from pathlib import Path

import lightning


class Stages(lightning.Callback):
    def _tell(self, trainer, stage):
        if trainer.is_global_zero and not trainer.sanity_checking:
            Path("stage").write_text(stage)

    def on_train_start(self, trainer, pl_module):
        self._tell(trainer, "training")

    def on_validation_start(self, trainer, pl_module):
        self._tell(trainer, "evaluating")

    def on_validation_end(self, trainer, pl_module):
        self._tell(trainer, "training")
"""


def write_plans(folder):
    """The dataset of these runs: small enough for hundreds of them."""
    return write_rooms_dataset(folder / "plans", num_train=24, num_val=4, size=96)


def options(plans, processes):
    own = ["--data.root", str(plans), "--trainer.log_every_n_steps=1", "--save_every_steps=3", "--trainer.max_epochs=6"]
    if processes > 1:
        own += [f"--trainer.devices={processes}", "--trainer.strategy=ddp", "--trainer.max_epochs=8"]
    return [*TINY_ARGS, *own, "--data.batch_size=2", "--trainer.callbacks=stages.Stages"]


def start(run, arguments, tmp_path):
    """Start `fit`; what it says is added to a file beside the run."""
    (tmp_path / "stages.py").write_text(STAGES)
    (tmp_path / "stage").unlink(missing_ok=True)
    log = (tmp_path / f"{run.name}.log").open("a")
    command = [sys.executable, "-m", "dino_lightning.fit", "--run_dir", str(run), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment, start_new_session=True)


def stage_of(tmp_path):
    """What the started process is doing: training or evaluating, or nothing of it yet."""
    file = tmp_path / "stage"
    return file.read_text() if file.exists() else ""


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


def kill(process, victim, run, when, rng, lengths):
    """SIGKILL at a random moment of one kind (see `MOMENTS`): of the process, or of one of its training processes.

    Gives what it was doing, or None where it ended before.
    """
    saved = run / "checkpoints" / "last.ckpt"
    before = saved.stat().st_mtime_ns if saved.exists() else 0
    start_up, life = lengths

    def saved_anew():
        return saved.exists() and saved.stat().st_mtime_ns != before

    if when in ("starting", "ever"):  # importing, reading data, resuming, before the first save: wherever it is by then
        moment = time.monotonic() + rng.uniform(0, start_up if when == "starting" else life)
        wait_for(lambda: time.monotonic() > moment, process)
    elif when == "evaluating":
        wait_for(lambda: stage_of(run.parent) == "evaluating", process)
        time.sleep(rng.uniform(0, 0.1))
    else:
        wait_for(saved_anew, process)
    if when == "writing":
        wait_for(lambda: any((run / "checkpoints").glob("tmp*")), process)
    elif when == "training":
        time.sleep(rng.uniform(0, 1.5))
    if process.poll() is not None:
        return None
    if stage_of(run.parent) == "evaluating":
        stage = "evaluating"
    elif any((run / "checkpoints").glob("tmp*")):
        stage = "writing"
    else:
        stage = "training" if saved_anew() else "resuming" if before else "starting"
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        processes = training_processes(process)
        processes[min(victim, len(processes) - 1)].kill()
    started = time.monotonic()
    process.wait(timeout=60)
    for left in psutil.process_iter():  # whoever is left of a run must end, too
        try:
            if str(run) in left.cmdline():
                left.wait(timeout=max(1, 60 - (time.monotonic() - started)))
        except psutil.NoSuchProcess:
            continue
    return stage


def run_with_kills(run, plans, rng, processes, wanted, lengths):
    """Train to the end, killed up to `wanted` times; what it was doing each time."""
    stages = []
    arguments = options(plans, processes)
    while True:
        resume = (run / "checkpoints" / "last.ckpt").exists()
        process = start(run, ["--ckpt_path", "last"] if resume else ["--overwrite", *arguments], run.parent)
        if len(stages) < wanted:
            victim = "all" if processes == 1 else rng.choice([0, 1, "all"])
            if stage := kill(process, victim, run, rng.choice(MOMENTS), rng, lengths):
                stages.append(stage)
                continue
        assert process.wait(timeout=600) == 0, (run.parent / f"{run.name}.log").read_text()[-3000:]
        return stages


def kill_runs(plans, tmp_path, *, processes, wanted, seed):
    """Kill `wanted` times, in as many runs as it takes; all must end as one that was not killed.

    Returns:
        What was done at each kill, and the number of runs.
    """
    rng = random.Random(seed)
    whole = tmp_path / "whole"
    began = time.monotonic()
    process = start(whole, options(plans, processes), tmp_path)
    wait_for(lambda: (whole / "checkpoints" / "last.ckpt").exists(), process)
    start_up = time.monotonic() - began
    assert process.wait(timeout=600) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    lengths = start_up, time.monotonic() - began
    stages, number = [], 0
    while len(stages) < wanted:
        number += 1
        run = tmp_path / f"killed{number}"
        new = run_with_kills(run, plans, rng, processes, wanted - len(stages), lengths)
        stages += new
        check_equal(whole, run)
        assert not list((run / "checkpoints").glob("*.link"))
        kinds = sorted(Counter(new).items())
        print(f"{processes} process(es), run {number} killed {len(new)} times, equal to the end: {kinds}", flush=True)
    return stages, number


def check_equal(run, other):
    """All metrics of all steps, and all weights, to the last bit."""
    expected, got = logged_metrics(run), logged_metrics(other)
    assert got == expected
    states = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, other)]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name


def main():
    processes, wanted, *seed = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        stages, runs = kill_runs(
            write_plans(Path(folder)), Path(folder), processes=processes, wanted=wanted, seed=seed[0] if seed else 0
        )
    print(f"killed {len(stages)} times in {runs} runs: {sorted(Counter(stages).items())}")


if __name__ == "__main__":
    main()
