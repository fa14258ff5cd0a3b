"""`launch --local`: what ends the job that runs beside it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sagemaker_entry.laptop import local_run

JOB = "import signal, sys, pathlib\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
JOB += "pathlib.Path(sys.argv[1]).touch()\nsignal.pause()"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_terminal_that_is_closed_stops_the_job_as_sigterm_does(tmp_path, monkeypatch):
    ready, start = tmp_path / "ready", subprocess.Popen

    def close_terminal():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(subprocess, "Popen", lambda _, **more: start([sys.executable, "-c", JOB, str(ready)], **more))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        threading.Thread(target=close_terminal).start()
        assert local_run.run_locally(tmp_path) == (7, signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        ready.unlink()
        threading.Timer(0.0, lambda: (close_terminal(), os.kill(os.getpid(), signal.SIGTERM))).start()
        assert local_run.run_locally(tmp_path) == (7, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
