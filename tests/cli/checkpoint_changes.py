"""Structural changes of a checkpoint, and seven ways to use one; `python -m tests.cli.checkpoint_changes` tries all.

A change must be refused in one sentence, or told in a line, or make no difference to what comes out.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from dino_lightning import load_detector
from dino_lightning.__main__ import run
from dino_lightning.errors import UserError
from tests.conftest import TINY_ARGS, forget_earlier_runs

OTHER_VALUES = (None, "text", -3, 2.5, [], {}, True, float("nan"), [["nested"]], {"a": {"b": None}})
SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
SHORT += ["--trainer.log_every_n_steps=1", "--ema_decay=0.9", "--early_stopping_patience=5"]


def train(rooms, folder):
    """The checkpoint that is changed: of a run of one epoch with all callbacks that have a state."""
    args = ["--data.root", str(rooms), "--run_dir", str(folder), "--trainer.max_epochs=1", *TINY_ARGS, *SHORT]
    assert run(["fit", *args]) == 0
    return folder / "checkpoints" / "last.ckpt"


# ------------------------------------------------------------------ changes


def at(content, path):
    """The mapping or list that holds the last key of a path, and that key."""
    for key in path[:-1]:
        content = content[key]
    return content, path[-1]


def delete(*path):
    def change(content):
        holder, key = at(content, path)
        del holder[key]

    return change


def put(value, *path):
    def change(content):
        holder, key = at(content, path)
        holder[key] = value(holder.get(key)) if callable(value) else value

    return change


def rename(*path):
    def change(content):
        holder, key = at(content, path)
        holder[f"{key}_renamed"] = holder.pop(key)

    return change


def spoilt(value):
    """The tensor with one value that is not a number."""
    value = value.clone()
    value.view(-1)[0] = float("nan")
    return value


def changes_of(content):
    """Name -> what changes the content of a checkpoint in place; the same for each run."""
    chosen = random.Random(17)
    found = {}

    def other(value):
        return chosen.choice([each for each in OTHER_VALUES if type(each) is not type(value)])

    for key, value in content.items():
        found[f"without {key}"] = delete(key)
        new = other(value)
        found[f"{key} = {new!r}"] = put(new, key)
    for key in ("state_dict", "hyper_parameters", "loops", "callbacks", "score_threshold"):
        found[f"{key} renamed"] = rename(key)
    settings = content["hyper_parameters"]
    for index, (key, value) in enumerate(settings.items()):
        new = other(value)
        found[f"hyperparameter {key} = {new!r}"] = put(new, "hyper_parameters", key)
        if index % 2:
            found[f"without hyperparameter {key}"] = delete("hyper_parameters", key)
    for key in ("num_classes", "hidden_dim", "image_size", "class_names", "num_heads"):
        found[f"hyperparameter {key} renamed"] = rename("hyper_parameters", key)
    found |= {
        "a new hyperparameter": put(1, "hyper_parameters", "rotated_boxes"),
        "one class name too many": put(["a", "b"], "hyper_parameters", "class_names"),
        "image_size 0": put(0, "hyper_parameters", "image_size"),
        "score_threshold 7.0": put(7.0, "score_threshold"),
        "score_threshold nan": put(float("nan"), "score_threshold"),
        "a newer format": put(99, "dino_lightning_format"),
        "options cut": put(lambda text: text[: len(text) // 2], "dino_lightning_options"),
        "options of no sections": put("a: b\n", "dino_lightning_options"),
    }
    names = list(content["state_dict"])
    first, head = names[0], next(name for name in names if name.endswith("decoder.class_head.weight"))
    middle, last = names[len(names) // 2], names[-1]
    for key in (first, middle, last, head):
        found[f"without tensor {key}"] = delete("state_dict", key)
    found |= {
        f"{first} renamed": rename("state_dict", first),
        "a tensor too many": put(torch.zeros(3), "state_dict", "model.extra"),
        f"{middle} with another shape": put(lambda value: value[None], "state_dict", middle),
        f"{head} with fewer rows": put(lambda value: value[:0], "state_dict", head),
        f"{head} nan": put(spoilt, "state_dict", head),
        f"{first} nan": put(spoilt, "state_dict", first),
        f"{first} inf": put(lambda value: value / 0, "state_dict", first),
        f"{first} whole numbers": put(lambda value: value.long(), "state_dict", first),
        f"{first} complex": put(lambda value: value.to(torch.complex64), "state_dict", first),
        f"{first} double": put(lambda value: value.double(), "state_dict", first),
        f"{first} sparse": put(lambda value: value.to_sparse(), "state_dict", first),
        f"{first} a list": put(lambda value: value.tolist(), "state_dict", first),
        "raw weights nan": put(spoilt, "raw_state_dict", first),
        "without a raw tensor": delete("raw_state_dict", middle),
    }
    optimizer, loop, callbacks = ("optimizer_states", 0), ("loops", "fit_loop"), ("callbacks",)
    by_name = {key.partition("{")[0]: key for key in content["callbacks"]}
    found |= {
        "no optimizer": put([], "optimizer_states"),
        "without param_groups": delete(*optimizer, "param_groups"),
        "without the optimizer's state": put({}, *optimizer, "state"),
        "state of a parameter lost": delete(*optimizer, "state", 3),
        "state of an unknown parameter": put({}, *optimizer, "state", 9999),
        "exp_avg lost": delete(*optimizer, "state", 0, "exp_avg"),
        "exp_avg nan": put(spoilt, *optimizer, "state", 0, "exp_avg"),
        "exp_avg of another shape": put(lambda value: value.T, *optimizer, "state", 0, "exp_avg"),
        "exp_avg_sq a number": put(1.0, *optimizer, "state", 0, "exp_avg_sq"),
        "step nan": put(float("nan"), *optimizer, "state", 0, "step"),
        "betas wrong": put("text", *optimizer, "param_groups", 0, "betas"),
        "without eps": delete(*optimizer, "param_groups", 0, "eps"),
        "a parameter less": put(lambda value: value[1:], *optimizer, "param_groups", 0, "params"),
        "no fit_loop": delete(*loop),
        "without epoch_progress": delete(*loop, "epoch_progress"),
        "epoch_progress a list": put([], *loop, "epoch_progress"),
        "completed a text": put("3", *loop, "epoch_progress", "current", "completed"),
        "completed negative": put(-1, *loop, "epoch_progress", "total", "completed"),
        "batch_progress lost": delete(*loop, "epoch_loop.batch_progress"),
        "loader state wrong": put(5, *loop, "state_dict", "combined_loader"),
        "optimizer steps a fraction": put(
            2.5, *loop, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "completed"
        ),
        "validate_loop lost": delete("loops", "validate_loop"),
        "EMA lost": delete(*callbacks, by_name["EMA"]),
        "EMA updates a text": put("many", *callbacks, by_name["EMA"], "updates"),
        "history a number": put(3, *callbacks, by_name["RunReport"], "history"),
        "history of other rows": put([1, 2], *callbacks, by_name["RunReport"], "history"),
        "ModelCheckpoint empty": put({}, *callbacks, by_name["ModelCheckpoint"]),
        "EarlyStopping's best a text": put("good", *callbacks, by_name["EarlyStopping"], "best_score"),
        "EarlyStopping lost": delete(*callbacks, by_name["EarlyStopping"]),
        "an unknown callback": put({"a": 1}, *callbacks, "Strange"),
    }
    return found


def broken_files(original):
    """Name -> the bytes of a file that is no checkpoint any more."""
    return {
        "empty file": b"",
        "text": b"hello",
        "cut in the middle": original[: len(original) // 2],
        "cut at the end": original[:-100],
        "first bytes lost": original[50:],
        "zeros in the middle": original[:5000] + bytes(4000) + original[9000:],
    }


# ------------------------------------------------------------------ commands


class Commands:
    """The ways to use a checkpoint, each giving what comes out of it in a form that can be compared."""

    def __init__(self, rooms, folder):
        self.rooms, self.folder = rooms, folder
        self.image = next((rooms / "val" / "images").glob("*.png"))

    def load_detector(self, file, out):
        detector = load_detector(file)
        with torch.no_grad():
            found = detector.detect([self.image], threshold=0.0)[0]
        numbers = [[round(value, 2) for value in row] for row in found.boxes_xyxy.tolist()]
        scores = [round(value, 3) for value in found.scores.tolist()]
        return numbers, scores, detector.class_names, detector.category_ids, detector.score_threshold

    def predict(self, file, out):
        args = ["--images", str(self.image), "--output", str(out), "--threshold=0.0", "--overlays=false"]
        code = run(["predict", "--ckpt_path", str(file), *args, "--num_workers=0", "--trainer.accelerator=cpu"])
        if code:
            return code
        rows = json.loads((out / "predictions.json").read_text())
        return [(row["category_id"], round(row["score"], 3), [round(x, 1) for x in row["bbox"]]) for row in rows]

    def convert(self, file, out):
        code = run(["convert", "--weights", str(file), "--output", str(out / "published.pth")])
        return code or self.tensors(out / "published.pth", "model")

    def export(self, file, out):
        code = run(["export", "--ckpt_path", str(file), "--format=directory", "--output", str(out / "model")])
        if code:
            return code
        return json.loads((out / "model" / "model.json").read_text()), self.tensors(out / "model" / "model.ckpt")

    def validate(self, file, out):
        code = run(["validate", "--ckpt_path", str(file), "--run_dir", str(out), "--report=false"])
        return code or None  # what it prints is compared

    def resume(self, file, out):
        code = run(["fit", "--ckpt_path", str(file), "--run_dir", str(out), "--trainer.max_epochs=2"])
        return code or self.tensors(out / "checkpoints" / "last.ckpt", "raw_state_dict")

    def start(self, file, out):
        args = ["--data.root", str(self.rooms), "--run_dir", str(out), "--trainer.max_epochs=1", *TINY_ARGS]
        code = run(["fit", f"--model.weights={file}", *args, *SHORT])
        return code or self.tensors(out / "checkpoints" / "last.ckpt", "raw_state_dict")

    @staticmethod
    def tensors(file, entry="state_dict"):
        stored = torch.load(file, weights_only=True)[entry]
        return {key: round(float(value.double().abs().sum()), 3) for key, value in stored.items()}

    def outcome(self, command, file):
        """(kind, what came out, lines said): kind is `done`, `refused`, `badly refused` or `traceback`."""
        forget_earlier_runs()
        out = Path(tempfile.mkdtemp(dir=self.folder))
        said, log = io.StringIO(), io.StringIO()
        handler = logging.StreamHandler(log)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).addHandler(handler)
        try:
            with warnings.catch_warnings(record=True) as caught, redirect_stdout(said), redirect_stderr(said):
                warnings.simplefilter("always")
                result, code = getattr(self, command)(file, out), 0
        except UserError as error:
            result, code = None, 1
            print(f"error: {error}", file=said)
        except BaseException:
            return "traceback", None, traceback.format_exc().splitlines()
        finally:
            for name in ("lightning.pytorch", "lightning.fabric"):
                logging.getLogger(name).removeHandler(handler)
            shutil.rmtree(out)
        if isinstance(result, int):
            result, code = None, result
        told = "".join(f"warning: {' '.join(str(each.message).split())}\n" for each in caught)
        text = said.getvalue() + log.getvalue() + told
        lines = text.replace(str(out), "OUT").replace(str(file), "FILE").splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        if code:
            good = code in (1, 2) and len(errors) == 1 and "Traceback" not in said.getvalue()
            return "refused" if good else "badly refused", None, errors or lines
        if command == "validate":
            result = [line for line in lines if "val/" in line]
        return "done", result, lines


ALL = ("load_detector", "predict", "convert", "export", "validate", "resume", "start")


def verdict_on(outcome, usual):
    """`refused`, `told` or `harmless`; or what must not be: `traceback`, `badly refused` or `silent`."""
    kind, result, lines = outcome
    if kind != "done":
        return kind
    told = [line for line in lines if line not in usual[2] and ("warning:" in line or "The checkpoint" in line)]
    return "told" if told else "harmless" if result == usual[1] else "silent"


class Fuzz:
    """Tries changes of one checkpoint."""

    def __init__(self, rooms, folder):
        self.commands = Commands(rooms, folder)
        self.original = train(rooms, folder / "run")
        self.file = folder / "copied" / "model.ckpt"
        self.file.parent.mkdir()
        self.content = torch.load(self.original, weights_only=True)
        self.broken = broken_files(self.original.read_bytes())
        self.changes = changes_of(self.content)
        self.names = [*self.changes, *self.broken]
        self.usual = {}

    def write(self, name):
        if name in self.broken:
            self.file.write_bytes(self.broken[name])
            return
        content = copy.deepcopy(self.content)
        if name:
            self.changes[name](content)
        torch.save(content, self.file)

    def try_all(self, name, commands):
        """command -> (verdict, lines)."""
        for command in commands:
            if command not in self.usual:
                self.write("")
                self.usual[command] = self.commands.outcome(command, self.file)
                assert self.usual[command][0] == "done", (command, self.usual[command])
        self.write(name)
        found = {command: self.commands.outcome(command, self.file) for command in commands}
        return {command: (verdict_on(each, self.usual[command]), each[2]) for command, each in found.items()}


def main():
    from dino_lightning.floor_plans import write_rooms_dataset

    folder = Path(tempfile.mkdtemp())
    fuzz = Fuzz(write_rooms_dataset(folder / "plans", num_train=8, num_val=4, size=160), folder)
    counts = Counter()
    wanted = sys.argv[1:] or ALL
    for name in fuzz.names:
        for command, (verdict, lines) in fuzz.try_all(name, wanted).items():
            counts[command, verdict] += 1
            if verdict in ("traceback", "badly refused", "silent"):
                print(
                    f"{verdict:<14}{command:<14}{name}\n    " + "\n    ".join(lines[-3:]),
                    file=sys.__stdout__,
                    flush=True,
                )
    print(len(fuzz.names), "changes", dict(counts))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
