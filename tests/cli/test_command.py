"""What all commands share: exit codes, one sentence, no traceback, a light start, one way to name a checkpoint."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.__main__ import COMMANDS, run
from dino_lightning.cli.command import Terminated, run_command
from dino_lightning.cli.help_pages import PAGES, pages
from sagemaker_entry import launch
from tests.conftest import TINY_ARGS

PROJECT = Path(__file__).parents[2]
HEAVY = {"torch", "lightning", "numpy", "jsonargparse", "torchvision", "scipy", "matplotlib", "PIL"}
CONFIG = str(PROJECT / "configs" / "rooms_demo.yaml")


@pytest.fixture(scope="module")
def trained(rooms, tmp_path_factory):
    """A run of one epoch in runs/one of a working directory."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        args = ["--data.root", str(rooms), "--run_dir", "runs/one", "--trainer.max_epochs=1", *TINY_ARGS]
        assert run(["fit", *args]) == 0
    return folder


# ---------------------------------------------------------------------- wrong options and bad input

WRONG = {
    "fit": (["--data.rot", "x"], "Did you mean --data.root?"),
    "validate": (["--data.rot", "x"], "Did you mean --data.root?"),
    "test": (["--bogus", "x"], "There is no option --bogus."),
    "predict": (["--ckpt_path", "x", "--image", "y"], "--images"),
    "export": (["--ckpt_path", "x", "--formt", "onnx"], "Did you mean --format?"),
    "convert": (["--weights", "x", "--output", "y", "--bogus"], "There is no option --bogus."),
    "weights": (["--bogus"], "There is no option --bogus."),
    "inspect": (["--bogus", "3"], "There is no option --bogus."),
    "preview": (["--num_image", "3"], "There is no option --num_image."),
    "to_coco": (["--data.root", "x", "--output", "y", "--imags", "link"], "There is no option --imags."),
    "rooms": (["--root", "x", "--sed", "1"], "Did you mean --seed?"),
}
BAD = {
    "fit": ["--data.root", "nowhere"],
    "validate": ["--ckpt_path", "nowhere.ckpt"],
    "test": ["--ckpt_path", "last"],
    "predict": ["--ckpt_path", "nowhere.ckpt", "--images", "nowhere"],
    "export": ["--ckpt_path", "nowhere.ckpt"],
    "convert": ["--weights", "nowhere.ckpt", "--output", "out.pth"],
    "weights": ["get", "nowhere"],
    "inspect": ["--data.root", "nowhere"],
    "preview": ["--data.root", "nowhere"],
    "to_coco": ["--data.root", "nowhere", "--output", "copy"],
    "rooms": ["--root", "plans", "--num_train", "0"],
}


def test_the_lists_name_every_command():
    assert WRONG.keys() == BAD.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("fit", "validate", "test")])
def test_help_is_as_wide_as_the_terminal(command, monkeypatch, capsys):
    said = []
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        with contextlib.suppress(SystemExit):
            run([command, "--help"])
        said.append(capsys.readouterr().out)
    assert max(map(len, said[0].partition("\n\n")[0].splitlines())) <= 80  # the usage
    bodies = [text[text.index("\n\n") :].splitlines() for text in said]
    narrow, wide = ([line for line in body if "python -m" not in line] for body in bodies)
    assert max(map(len, narrow)) <= 80 and len(narrow) > len(wide)
    described = [text[text.index("\n\n") : text.index("options:")].split() for text in said]
    assert described[0] == described[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_option_ends_with_2_and_one_sentence(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, said = WRONG[command]
    assert run([command, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input_ends_with_1_and_one_sentence(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([command, *BAD[command]]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("command", ["fit", "inspect", "preview"])
def test_a_missing_dataset_folder_is_asked_for_by_its_option(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([command, "--data.batch_size", "1"]) == 2
    assert capsys.readouterr().err == "error: --data.root is needed: the folder of the dataset.\n"


def test_launch_keeps_to_the_same_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["--config", CONFIG, "--rol", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Did you mean --role?" in error
    assert launch.main(["--config", "nowhere.yaml", "--data", "nowhere"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert launch.main(["status"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_misspelled_command_is_told_the_closest(capsys):
    assert run(["prevew"]) == 2
    assert capsys.readouterr().err == "error: There is no command 'prevew'. Did you mean preview?\n"
    assert run(["zzz"]) == 2
    assert "validate" in capsys.readouterr().err


def test_a_value_of_another_kind_is_named_with_what_it_must_be(capsys):
    assert run(["fit", "--data.root", "x", "--trainer.max_epochs", "many"]) == 2
    assert capsys.readouterr().err == "error: --trainer.max_epochs many: this must be a whole number or null.\n"


# ---------------------------------------------------------------------- signals

LONG = {  # what takes long enough to be interrupted, if only because of its imports
    "validate": ["--ckpt_path", "runs/one"],
    "predict": ["--ckpt_path", "runs/one", "--images", "{plans}"],
    "export": ["--ckpt_path", "runs/one"],
    "convert": ["--weights", "runs/one", "--output", "published.pth"],
    "inspect": ["--data.root", "{rooms}"],
    "preview": ["--data.root", "{rooms}"],
    "to_coco": ["--data.root", "{rooms}", "--output", "copy"],
    "rooms": ["--root", "more", "--num_train", "5000"],
    "fit": ["--data.root", "{rooms}"],
}


def catches_sigterm(process):
    """Whether a process handles SIGTERM by now, which is the first thing that a command does."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def interrupted(command, cwd, number, delay=0.0):
    """Start a command, send it a signal once it handles signals, and return (exit code, stderr)."""
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not catches_sigterm(process):
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads which signals a process handles from /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("command", LONG)
def test_a_signal_ends_every_command_without_a_traceback(command, number, trained, rooms):
    options = [text.format(rooms=rooms, plans=rooms / "val" / "images") for text in LONG[command]]
    code, error = interrupted([sys.executable, "-m", "dino_lightning", command, *options], trained, number, 0.2)
    # A shell sees 130 in both cases: Python ends by SIGINT if it came while text was executed, as dataclasses do.
    assert code in {128 + number, *({-number} if number == signal.SIGINT else ())}, error
    assert "Traceback" not in error and "Interrupted" in error
    assert not list(trained.glob("**/tmp*")) and not (trained / "published.pth").exists()


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_signal_while_a_checkpoint_is_written_is_no_error(tmp_path, capsys, stop, code):
    """PyTorch's writer complains, on its way out, of the file that it could not finish."""

    class Stopping:
        def __init__(self, file):
            self.file, self.written = file, 0

        def write(self, data):
            self.written += 1
            if self.written == 3:
                raise stop
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    def action():
        with (tmp_path / "model.ckpt").open("wb") as file:
            torch.save({"weights": [torch.zeros(100_000) for _ in range(4)]}, Stopping(file))
        return 0

    assert run_command(action) == code
    error = capsys.readouterr().err
    assert "Interrupted." in error and "Traceback" not in error


def test_ctrl_c_that_a_package_swallows_is_no_error(capsys):
    """As NumPy does, interrupted while it is imported: it asks itself for a module until Python gives up."""

    def action():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        raise RecursionError("maximum recursion depth exceeded")

    assert run_command(action) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(RecursionError):
        run_command(lambda: (_ for _ in ()).throw(RecursionError("without it")))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads which signals a process handles from /proc")
def test_a_second_ctrl_c_ends_training_with_130(rooms, tmp_path):
    """The first one asks for a checkpoint after the step; the second one does not wait for it."""
    command = [sys.executable, "-m", "dino_lightning.fit", "--data.root", str(rooms), *TINY_ARGS]
    command += ["--trainer.max_epochs=1000", "--trainer.limit_val_batches=0", "--run_dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.csv"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.stderr.readline()
    while said and "saving a checkpoint" not in said:
        said = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error


# ---------------------------------------------------------------------- a light start


@pytest.mark.parametrize(
    "module, args",
    [
        ("dino_lightning", ["--help"]),
        ("dino_lightning", ["--version"]),
        ("dino_lightning.fit", ["--help"]),
        *(("dino_lightning", [command, "--help"]) for command in COMMANDS),
        ("sagemaker_entry.launch", ["--help"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_help_and_version_load_nothing_heavy(module, args):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', *{args!r}]\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        f"print('HEAVY', sorted(set(sys.modules) & {HEAVY!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.rstrip().endswith("HEAVY []")
    assert len(done.stdout.splitlines()) > 1


def test_importing_the_package_loads_nothing_heavy_and_has_all_public_names():
    code = (
        "import sys, dino_lightning as d\n"
        f"print(sorted(set(sys.modules) & {HEAVY!r}))\n"
        "print(set(d.__all__) <= set(dir(d)), all(getattr(d, name).__name__ for name in d.__all__))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.splitlines() == ["[]", "True True"]


def test_a_public_name_that_is_none_is_refused_as_by_any_module():
    import dino_lightning

    with pytest.raises(AttributeError, match="has no attribute 'Dino'"):
        _ = dino_lightning.Dino


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_generated_pages_are_those_of_the_parser(path):
    """Stale: run `python -m dino_lightning.cli.help_pages`."""
    assert path.read_text(encoding="utf-8") == pages()[path]


def test_the_short_help_begins_with_what_most_people_set(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["fit", "--help"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 100
    places = [printed.index(f"--{name}") for name in ("data.root", "data.batch_size", "model.lr", "trainer.devices")]
    assert places == sorted(places)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_short_help_is_as_wide_as_the_terminal(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert run([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= min(width, 100) or "python -m" in line or len(line.split()) == 2 for line in lines)
    stored = next(path for path in pages() if path.name == PAGES[command])
    assert " ".join(lines).split() == stored.read_text(encoding="utf-8").replace("COMMAND", command).split()
    column = lines[[line.split()[:1] == ["--data.root"] for line in lines].index(True)].find("the dataset")
    assert column == (-1 if width == 40 else 32)


def test_no_attribute_takes_the_place_of_an_option_in_help():
    for made in (CocoDataModule, DINOModule):
        options, _, attributes = str(made.__doc__).partition("Attributes:")
        names = [set(re.findall(r"^ {8}(\w+): ", part, re.MULTILINE)) for part in (options, attributes)]
        assert names[0] and not names[0] & names[1]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_help_all_lists_this_programs_options_first_and_the_trainers_last(command, capsys):
    with pytest.raises(SystemExit) as ended:
        run([command, "--help", "all"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m dino_lightning {command} [options]\n")
    options = ("--run_dir", "--data.root", "--model.lr", "--trainer.accelerator")
    places = [printed.index(f"\n  {option}") for option in options]
    assert places == sorted(places)


# ---------------------------------------------------------------------- one way to name a checkpoint


@pytest.mark.parametrize("given", ["last", "runs/one", "runs/one/checkpoints/best.ckpt"])
def test_every_command_takes_a_checkpoint_a_run_and_last(given, trained, rooms, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(trained)
    quiet = ["--trainer.enable_progress_bar=false", "--report=false"]
    assert run(["validate", "--ckpt_path", given, *quiet]) == 0
    assert run(["test", "--ckpt_path", given, *quiet]) == 0
    images = str(rooms / "val" / "images")
    assert run(["predict", "--ckpt_path", given, "--images", images, "--output", str(tmp_path / "found")]) == 0
    directory = ["--format", "directory", "--output", str(tmp_path / "model")]
    assert run(["export", "--ckpt_path", given, *directory]) == 0
    assert run(["convert", "--weights", given, "--output", str(tmp_path / "published.pth")]) == 0
    capsys.readouterr()


def test_fit_resumes_a_run_by_its_folder(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert run(["fit", "--ckpt_path", "runs/one", "--trainer.max_epochs=2"]) == 0
    assert "         2 " in capsys.readouterr().out
