"""Ctrl-C, once and twice, at the stages of every command; `python -m tests.cli.interrupts [COMMAND...]` tries all.

A stage is the moment when a function is called, or when a module is imported, in the first process that comes there or
in that of a program (`program@module:function`). The command runs with a `sitecustomize` that waits there for the
signal, which is sent from outside to its whole group of processes, as a terminal does.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import torch
import yaml
from PIL import Image

from dino_lightning.__main__ import run
from dino_lightning.floor_plans import write_rooms_dataset
from tests.cli.interrupted_commands import END, MATRIX
from tests.conftest import TINY_ARGS, TINY_SIZES

PATIENCE = 120  # seconds for a command to reach a stage, or to end
GAP = 0.1  # seconds between two presses
PROJECT = Path(__file__).parents[2]
CONTENT = bytes(4_000_000)  # of the weights to fetch
# Waits at a module or a function, in the first process that comes there. `weights get` fetches from a table of its own.
SITE = """
import atexit
import functools
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

program, _, place = os.environ["INTERRUPT_AT"].rpartition("@")
module, _, function = place.partition(":")


def wait():
    if program and program not in sys.orig_argv:
        return
    try:
        os.close(os.open(os.environ["INTERRUPT_FILE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    for _ in range(20):
        time.sleep(0.01)


def change(loaded):
    if loaded.__name__ == "dino_lightning.weights.zoo":
        loaded.TABLE = Path(os.environ["INTERRUPT_TABLE"])
    if loaded.__name__ != module or not function:
        return
    *owners, name = function.split(".")
    owner = loaded
    for each in owners:
        owner = getattr(owner, each)
    real = getattr(owner, name)

    @functools.wraps(real)
    def waiting(*args, **kwargs):
        wait()
        return real(*args, **kwargs)

    setattr(owner, name, waiting)


class Finder:
    def __init__(self):
        self.asking = False

    def find_spec(self, name, path=None, target=None):
        if name not in (module, "dino_lightning.weights.zoo") or self.asking:
            return None
        if name == module and not function:
            wait()
        self.asking = True  # more than once, as some look first whether a module is there
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        execute = spec.loader.exec_module

        def execute_and_change(loaded):
            execute(loaded)
            change(loaded)

        spec.loader.exec_module = execute_and_change
        return spec


if module == "exit":
    atexit.register(wait)
if module in sys.modules:
    change(sys.modules[module])
sys.meta_path.insert(0, Finder())
"""


class SlowServer:
    """Serves weights over loopback, slowly enough to be interrupted."""

    def __init__(self):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(CONTENT)))
                self.end_headers()
                try:
                    for start in range(0, len(CONTENT), 200_000):
                        self.wfile.write(CONTENT[start : start + 200_000])
                        time.sleep(0.05)
                except OSError:  # the command has been interrupted
                    pass

            def log_message(self, *args):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()

    def table(self):
        """A table of weights that are fetched from here."""
        table = yaml.safe_load((PROJECT / "dino_lightning" / "weights" / "zoo.yaml").read_text())
        row = next(row for row in table["weights"].values() if row["layout"] == "detrex")
        row |= {"file": "served.pth", "sha256": hashlib.sha256(CONTENT).hexdigest(), "base": "detrex", "mirrors": []}
        table["bases"]["detrex"] = f"http://127.0.0.1:{self.httpd.server_port}/"
        return yaml.safe_dump({**table, "weights": {"served": row}})


@dataclass
class Outcome:
    """How an interrupted command ended: what is wrong with that, and how long it took after the last press."""

    code: int
    said: str
    seconds: float
    wrong: list[str]


class Interrupts:
    """Runs commands in `folder`, on a dataset and a checkpoint that are made once."""

    def __init__(self, folder):
        self.folder, self.server = folder, SlowServer()
        rooms = write_rooms_dataset(folder / "rooms", num_train=8, num_val=4, size=96)
        train = ["--data.root", str(rooms), "--run_dir", str(folder / "trained"), "--trainer.max_epochs=1"]
        assert run(["fit", *train, *TINY_ARGS]) == 0
        config = folder / "config.yaml"
        trainer = {"max_epochs": 2, "log_every_n_steps": 1}
        model = {**TINY_SIZES, "backbone_weights": None}
        data = {"image_size": 64, "max_size": 96, "num_workers": 0, "batch_size": 1}
        config.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
        (folder / "table.yaml").write_text(self.server.table())
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(SITE)
        checkpoint = folder / "trained" / "checkpoints" / "last.ckpt"
        model = folder / "model"
        assert run(["export", "--ckpt_path", str(checkpoint), "--format", "directory", "--output", str(model)]) == 0
        places = {"rooms": rooms, "checkpoint": checkpoint, "config": config, "model": model}
        self.places = {name: str(path) for name, path in places.items()}

    def run(self, command, stage, presses):
        """Interrupt a command at a stage; None if it ended before it came there."""
        work = Path(tempfile.mkdtemp(dir=self.folder))
        there, said = work / "there", work / "said"
        home = work / "work"
        home.mkdir()
        environment = {
            **os.environ,
            "INTERRUPT_AT": stage,
            "INTERRUPT_FILE": str(there),
            "INTERRUPT_TABLE": str(self.folder / "table.yaml"),
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), str(PROJECT)]),
            "XDG_CACHE_HOME": str(home / "cache"),
            "TORCH_HOME": str(home / "cache"),
            "TMPDIR": str(work),
            "MPLCONFIGDIR": str(self.folder / "matplotlib"),
            "OMP_NUM_THREADS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        arguments = [text.format(**self.places) for text in command.arguments]
        with said.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=home, env=environment, stdout=file, stderr=file, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
            )  # fmt: skip
        limit = time.monotonic() + PATIENCE
        while process.poll() is None and not there.exists():
            assert time.monotonic() < limit, f"{arguments}: {stage} was not reached"
            time.sleep(0.002)
        if not there.exists():
            shutil.rmtree(work)
            return None
        time.sleep(0.005)
        for press in range(presses):
            if press:
                time.sleep(GAP)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
        pressed = time.monotonic()
        process.wait(timeout=PATIENCE)
        seconds = time.monotonic() - pressed
        wrong = [*wrong_files(home), *processes_left(process.pid, work)]
        text = said.read_text()
        wrong += wrong_words(text, process.returncode, stage, command, presses)
        shutil.rmtree(work)
        return Outcome(process.returncode, text, seconds, wrong)


def wrong_words(text, code, stage, command, presses):
    """What is wrong with the exit code and with what was printed."""
    wrong = [
        f"it says {word!r}"
        for word in ("Traceback", "Exception ignored", "rror: ", "KeyboardInterrupt")
        if word in text
    ]
    # Python ends by SIGINT if it came while text was executed, or at its very end: to a shell that is 130 as well
    stops = (128 + signal.SIGINT, -signal.SIGINT, *([0] if stage.endswith(END) else []))
    if stage == command.served:
        stops = (0,) if presses == 1 else (0, 128 + signal.SIGINT)  # twice: unless it has ended within seconds
    if code not in stops:
        wrong.append(f"exit code {code}")
    sentences = sum(line.startswith(("Interrupted", "Stopped")) for line in text.splitlines())
    if not stage.endswith(END) and sentences != (stage != command.served or code != 0):
        wrong.append(f"{sentences} sentences of an interruption")
    if stage in (command.saves if presses == 1 else command.saved) and "esume" not in text:
        wrong.append("no way to resume")
    return wrong


def wrong_files(home):
    """Files that are not whole, and what should have been removed."""
    for path in sorted(home.rglob("*")):
        if path.name.startswith("tmp") or path.name.startswith((".plans-", ".model.")):
            yield f"{path.relative_to(home)} is left"
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name.endswith("served.pth"):
                assert path.read_bytes() == CONTENT
            elif path.suffix in (".ckpt", ".pth"):
                torch.load(path, weights_only=True)
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".yaml":
                yaml.safe_load(path.read_text())
        except Exception as error:
            yield f"{path.relative_to(home)} is not whole ({error})"


def processes_left(group, work):
    """Processes of the command that are still there some seconds later, which are ended here."""
    limit = time.monotonic() + 15
    while left := [each for each in psutil.process_iter() if _belongs(each, group, work)]:
        if time.monotonic() > limit:
            yield f"{len(left)} processes are left"
            for each in left:
                each.kill()
        time.sleep(0.05)


def _belongs(process, group, work):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and (
            os.getpgid(process.pid) == group or process.environ().get("TMPDIR") == str(work)
        )
    except (psutil.Error, OSError):
        return False


def main():
    wanted = sys.argv[1:] or list(MATRIX)
    folder = Path(tempfile.mkdtemp())
    interrupts, runs, bad = Interrupts(folder), 0, 0
    for name in wanted:
        command = MATRIX[name]
        for stage in command.stages:
            for presses in (1, 2):
                found = interrupts.run(command, stage, presses)
                if found is None:
                    print(f"{name:<18} {stage:<70} {presses}  NOT REACHED", flush=True)
                    bad += 1
                    continue
                runs, bad = runs + 1, bad + bool(found.wrong)
                print(
                    f"{name:<18} {stage:<70} {presses}  code {found.code:>4}  {found.seconds:>5.1f} s  "
                    f"{'; '.join(found.wrong) or 'good'}",
                    flush=True,
                )
                if found.wrong:
                    print("    " + "\n    ".join(found.said.splitlines()[-40:]), flush=True)
    print(f"{runs} interruptions, {bad} of them wrong")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
