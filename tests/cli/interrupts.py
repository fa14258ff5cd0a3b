"""Ctrl-C, once and twice, at the stages of every command; `python -m tests.cli.interrupts [COMMAND...]` tries all.

A stage is the moment when a function is called, or when a module is imported: the command runs with a `sitecustomize`
that waits there for the signal, which is sent from outside to its whole group of processes, as a terminal does.
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

from dino_lightning.__main__ import COMMANDS, run
from dino_lightning.floor_plans import write_rooms_dataset
from tests.conftest import TINY_ARGS, TINY_SIZES

PATIENCE = 120  # seconds for a command to reach a stage, or to end
GAP = 0.1  # seconds between two presses
PROJECT = Path(__file__).parents[2]
CONTENT = bytes(4_000_000)  # of the weights to fetch
END = "exit"  # the command has done its work, and Python ends
START = ("argparse", "lightning.pytorch")  # imports
SAVE, READ = "torch.serialization:_save", "dino_lightning.data.read_files:read_files"
MODULE = "dino_lightning.training.module:"
STEP, CHECK = MODULE + "DINOModule.training_step", MODULE + "DINOModule.validation_step"
LOAD, WRITE = "dino_lightning.weights.reading:read_checkpoint", "dino_lightning.files:atomic_write"

# Waits at a module or a function, in the first process that comes there. `weights get` fetches from a table of its own.
SITE = """
import atexit
import functools
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

module, _, function = os.environ["INTERRUPT_AT"].partition(":")


def wait():
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
        self.asked = set()

    def find_spec(self, name, path=None, target=None):
        if name not in (module, "dino_lightning.weights.zoo") or name in self.asked:
            return None
        self.asked.add(name)
        if not function:
            wait()
        spec = find_spec(name)
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


@dataclass(frozen=True)
class Command:
    """A command line, in a folder of its own, and the stages at which it is interrupted.

    Attributes:
        arguments: of `python -m`; `{rooms}`, `{checkpoint}` and `{config}` are filled in.
        stages: `module` (it is imported) or `module:function` (it is called), in the order of time.
        saves: the stages at which it saves a checkpoint, and says how to resume.
    """

    arguments: tuple[str, ...]
    stages: tuple[str, ...]
    saves: tuple[str, ...] = ()


def own(*arguments):
    return ("dino_lightning", *arguments)


FIT = (
    *own("fit", "--data.root", "{rooms}", "--run_dir", "run", *TINY_ARGS),
    *("--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--data.batch_size=2"),
)
DDP = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=20")
FIT_STAGES = (READ, MODULE + "DINOModule.__init__", STEP, CHECK, SAVE)
DRAW = ("dino_lightning.callbacks.learning_curves:draw_curves", "dino_lightning.files:save_figure")
CLOSING = "dino_lightning.callbacks.learning_curves:LearningCurves.table"
EVALUATED = ("--ckpt_path", "{checkpoint}", "--run_dir", "out", "--trainer.enable_progress_bar=false")
EVALUATION = (*START, READ, LOAD, CHECK, "dino_lightning.report:write_report", WRITE, END)
LOCAL = ("--config", "{config}", "--data", "{rooms}", "--local", "--local-dir", "ml")
RESULTS, FORMATS = "dino_lightning.inference.results:", "dino_lightning.export.formats:"
DIRECTORY = "dino_lightning.export.model_directory:write_model_directory"
LAPTOP, CONTAINER = "sagemaker_entry.laptop.", "sagemaker_entry.container."
LAUNCHED = (START[0], LAPTOP + "training_config:check_training")
MATRIX = {
    "fit": Command(
        (*FIT, "--trainer.num_sanity_val_steps=0"),
        (*START, "torch", *FIT_STAGES, *DRAW, CLOSING, END),
        saves=(STEP, CHECK),
    ),
    "fit, 2 loaders": Command((*FIT, "--data.num_workers=2"), (CHECK, STEP, SAVE), saves=(CHECK, STEP)),
    "fit, 2 processes": Command((*FIT, *DDP), FIT_STAGES, saves=(STEP, CHECK)),
    "validate": Command(own("validate", *EVALUATED), EVALUATION),
    "test": Command(own("test", *EVALUATED), EVALUATION),
    "predict": Command(
        own("predict", "--ckpt_path", "{checkpoint}", "--images", "{rooms}/val/images", "--num_workers=1"),
        (*START, LOAD, RESULTS + "record", "dino_lightning.inference.loop:_draw", RESULTS + "write_results",
         RESULTS + "_JsonList.close", END),
    ),
    "export": Command(
        own("export", "--ckpt_path", "{checkpoint}", "--output", "model.onnx"),
        (*START, LOAD, FORMATS + "write_onnx", "onnx:save_model", FORMATS + "run_onnx", END),
    ),
    "export, directory": Command(
        own("export", "--ckpt_path", "{checkpoint}", "--format", "directory", "--output", "model"),
        (LOAD, DIRECTORY, SAVE, END),
    ),
    "convert": Command(
        own("convert", "--weights", "{checkpoint}", "--output", "published.pth"), (*START, LOAD, SAVE, END)
    ),
    "inspect": Command(
        own("inspect", "--data.root", "{rooms}"),
        (*START, READ, "dino_lightning.inspection.image_facts:facts_of_all", "dino_lightning.inspection.page:as_html",
         WRITE, END),
    ),
    "preview": Command(
        own("preview", "--data.root", "{rooms}"),
        (*START, READ, "dino_lightning.visualization.panels:draw_panels", "matplotlib.figure:Figure.savefig", END),
    ),
    "rooms": Command(
        own("rooms", "--root", "plans", "--num_train", "300"),
        (START[0], "numpy", "dino_lightning.floor_plans.dataset:draw_plan", "PIL.Image:Image.save", END),
    ),
    "weights": Command(own("weights", "get", "served"), (START[0], "dino_lightning.weights.download:_read", END)),
    "to_coco": Command(
        own("to_coco", "--data.root", "{rooms}", "--output", "copy"),
        (*START, READ, "json:dump", "shutil:copyfile", END),
    ),
    "launch --local": Command(
        ("sagemaker_entry.launch", *LOCAL),
        (*LAUNCHED, LAPTOP + "dataset_pack:write_dataset", CONTAINER + "environment:read_environment",
         CONTAINER + "channels:data_options", STEP, SAVE, DIRECTORY, END),
        saves=(STEP,),
    ),
    "launch --dry-run": Command(
        ("sagemaker_entry.launch", *LOCAL[:4], "--dry-run"),
        (*LAUNCHED, "boto3", LAPTOP + "start:make_plan", LAPTOP + "start:planned_job", END),
    ),
}  # fmt: skip
assert {name.partition(",")[0] for name in MATRIX} == {*COMMANDS, "launch --local", "launch --dry-run"}


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
        self.places = {"rooms": str(rooms), "checkpoint": str(checkpoint), "config": str(config)}

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
    stops = (
        128 + signal.SIGINT,
        -signal.SIGINT,
        *([0] if stage == END else []),
        *([143] if "--local" in command.arguments else []),
    )
    if code not in stops:
        wrong.append(f"exit code {code}")
    sentences = sum(line.startswith(("Interrupted", "Stopped")) for line in text.splitlines())
    if stage != END and sentences != 1:
        wrong.append(f"{sentences} sentences of an interruption")
    if presses == 1 and stage in command.saves and "esume" not in text:
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
            elif path.suffix in (".ckpt", ".pth") and path.name != "served.pth":
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
