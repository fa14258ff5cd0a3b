"""A server as a process of its own, and requests to it over loopback."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from sagemaker_entry import serve

uvicorn = pytest.importorskip("uvicorn")


def ask(port, body=None, kind="image/png", path="/invocations", method=None, **headers):
    """(status, content) of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        method = method or ("GET" if body is None else "POST")
        connection.request(method, path, body, {**({"Content-Type": kind} if kind else {}), **named})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else None
    finally:
        connection.close()


@contextmanager
def in_a_thread(load, **options):
    """The server in a thread of this process, with what `load` gives for a model; yields its port."""
    server = uvicorn.Server(uvicorn.Config(serve.Server(load, **options).app(), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


class Server:
    """The server of a model directory, run from the code in it as in the container; ends with the `with` block."""

    def __init__(self, model_dir, *arguments, command=None, **variables):
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        given = ["--model", str(model_dir), "--host", "127.0.0.1", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "sagemaker_entry.serve", *given],
            env={**kept, "PYTHONPATH": str(model_dir / "code"), "OMP_NUM_THREADS": "1", **variables},
            cwd=model_dir,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    @property
    def log(self):
        return "\n".join(self.lines)

    def wait_for(self, pattern):
        """The match of a pattern in the log, once it is there."""
        while not (found := re.search(pattern, self.log)):
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        return found

    def ready(self):
        """Waits until the model is loaded."""
        self.port = int(self.wait_for(r"running on http://127\.0\.0\.1:(\d+)")[1])
        self.wait_for(r"ready after")
        return self

    def ask(self, *arguments, **more):
        """(status, content) of an answer; arguments as of `ask`."""
        return ask(self.port, *arguments, **more)

    def terminate(self):
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)
