"""How the launcher is stopped, and ends what it has started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_lightning.interrupts import ctrl_c_left_to_this_process
from sagemaker_entry.container import stopping
from tests.export.exported import save, tiny_module

SLEEP = "import time; time.sleep(600)"
# Starts a process in a session of its own, as torchrun does, which starts another in its group, as loaders are.
LIKE_TORCHRUN = f"""
import subprocess, sys, time
inner = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True); " \\
    "time.sleep(600)"
print(subprocess.Popen([sys.executable, "-c", inner], start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return bool(status.strip()) and not status.startswith("Z")


@pytest.mark.parametrize("source", ["/proc", "ps"])
def test_what_the_training_processes_have_started_is_killed_with_them(monkeypatch, source):
    if source == "ps":
        monkeypatch.setattr(stopping, "PROCESSES", Path("nowhere"))
    child = subprocess.Popen(
        [sys.executable, "-c", LIKE_TORCHRUN], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    below = [int(child.stdout.readline()) for _ in range(2)]
    assert all(map(is_running, below))
    stopping.kill(child)
    assert child.returncode == -signal.SIGKILL
    limit = time.monotonic() + 20
    while any(map(is_running, below)):  # the system takes a moment
        assert time.monotonic() < limit
        time.sleep(0.01)
    child.stdout.close()


def test_a_signal_that_comes_before_it_is_handled_is_not_lost():
    code = (
        "import sys; print('imports', flush=True); sys.stdin.readline()\n"
        "from sagemaker_entry.container.stopping import StopSignal\n"
        "print(StopSignal(print).at is not None)"
    )
    with ctrl_c_left_to_this_process():
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    assert child.stdout.readline() == "imports\n"
    child.send_signal(signal.SIGINT)
    said, error = child.communicate("\n", timeout=60)
    assert said == "received SIGINT: saving a checkpoint and stopping\nTrue\n" and not error
    assert child.returncode == 0


WRITES_A_MODEL = """
import sys, time, types, pathlib, torch
from sagemaker_entry import train

def slow(*_):
    print("writing", flush=True)
    time.sleep(60)

torch.save = slow
stop = train.StopSignal(train.say)
root = pathlib.Path(sys.argv[1])
place = types.SimpleNamespace(checkpoint_dir=root, model_dir=root / "model")
print(train._write_model(place, stop, complete=True))
"""


def test_a_second_ctrl_c_ends_the_writing_of_the_model_and_leaves_no_part_of_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save(tiny_module(), tmp_path / "checkpoints" / "best.ckpt")
    child = subprocess.Popen(
        [sys.executable, "-c", WRITES_A_MODEL, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGINT)
    assert "saving a checkpoint and stopping" in child.stdout.readline()
    child.send_signal(signal.SIGINT)
    said, error = child.communicate(timeout=30)
    assert said.endswith("stopped at once: no model was written; the checkpoints are kept\nFalse\n") and not error
    assert list((tmp_path / "model").iterdir()) == []
