"""The pages of `fit --help`, `validate --help` and `test --help`, docs/options.md and the list of options.

They are made from the parser. Building it takes seconds, as it imports PyTorch and Lightning; so the short pages and
the list, from which `launch` parses, are files, and a test keeps them in step with the parser. `python -m
dino_lightning.cli.help_pages` writes them again; `--help all` asks the parser.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dino_lightning.console import WHOLE_WORDS, wrapped
from dino_lightning.files import atomic_write

HERE = Path(__file__).parent
PAGES = {"fit": "help_fit.txt", "validate": "help_evaluate.txt", "test": "help_evaluate.txt"}
WIDTH, COLUMN = 100, 32
ALL = "All options: --help all, or docs/options.md. A misspelled option is refused, with the names that exist."

SKIPPED = ("help", "print_config", "data", "model", "trainer", "data.help", "model.help", "trainer.help")
RUN = ("config", "ckpt_path", "run_dir", "overwrite", "seed_everything")
DATA = (
    "data.root", "data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images",
    "data.batch_size", "data.augmentation", "data.image_size", "data.max_size", "data.num_workers", "data.on_bad_image",
)  # fmt: skip
MODEL = (
    "model.weights", "model.backbone", "model.backbone_weights", "model.num_queries", "model.lr", "model.backbone_lr",
    "model.lr_schedule", "model.lr_drop_epochs", "model.freeze",
)  # fmt: skip
HELPERS = (
    "auto_batch_size", "ema_decay", "best_by", "early_stopping_patience", "save_every_minutes", "wandb", "mlflow",
)  # fmt: skip
TRAINER = (
    "trainer.max_epochs", "trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.precision",
    "trainer.accumulate_grad_batches", "trainer.check_val_every_n_epoch",
)  # fmt: skip
EVALUATION_DATA = ("data.root", "data.val_annotations", "data.test_annotations", "data.val_batch_size")

FIT = """usage: python -m dino_lightning.fit --data.root DIR [--config FILE] [options]

Train DINO on a COCO-format dataset. Without any option: a demo on floor plans that it draws itself.

    python -m dino_lightning.fit --config room_detection.yaml --data.root DIR
    python -m dino_lightning.fit --ckpt_path last          resume the newest run
"""
EVALUATE = """usage: python -m dino_lightning COMMAND --ckpt_path RUN_OR_CHECKPOINT [options]

Evaluate a checkpoint on a split of the dataset that it was trained on, or of another one, and write a report.
validate takes the validation split, test the test split.

    python -m dino_lightning COMMAND --ckpt_path last      the best checkpoint of the newest run
"""
# What the parsers of Lightning say less plainly, or do not know at all.
OWN_WORDS = {
    "config": "YAML file with options, a packaged one too; later files and options win",
    "ckpt_path": "a checkpoint, the folder of a run, or 'last': the newest run in runs/",
    "seed_everything": "seed of all random numbers",
    "trainer.max_epochs": "epochs to train",
    "trainer.accelerator": "gpu, cpu, mps or auto",
    "trainer.devices": "how many devices, or which: 2, or 0,1",
    "trainer.strategy": "ddp for several GPUs",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed; by default what suits the device",
    "trainer.accumulate_grad_batches": "batches whose gradients make one optimizer step",
    "trainer.check_val_every_n_epoch": "validate after every so many epochs",
}
VALUES = {"config": "FILE", "ckpt_path": "PATH", "run_dir": "DIR", "data.root": "DIR", "seed_everything": "N"}
VALUES |= {"overwrite": "", "wandb": "PROJECT", "mlflow": "URI"}


def help_page(command: str, args: Sequence[str]) -> str | None:
    """The short page, as wide as the terminal; None for other options than `--help`, `--help all` among them.

    Args:
        command: `fit`, `validate` or `test`.
        args: its options.
    """
    if not {"-h", "--help"} & set(args) or asks_for_all(args):
        return None
    page = (HERE / PAGES[command]).read_text(encoding="utf-8").replace("COMMAND", command).rstrip()
    return in_columns(page, min(shutil.get_terminal_size().columns, WIDTH))


def in_columns(page: str, width: int) -> str:
    """A stored page in lines of at most so many characters, but for commands and for the names of options.

    Options and what they do stay in their two columns; where the second would have less than 30 characters, it moves
    to the left and what an option does begins on a line of its own.

    Args:
        page: as `pages` makes it: options are indented by two spaces, what they do begins at `COLUMN`.
        width: characters in a line.
    """
    sections: list[str] = []
    for section in page.split("\n\n"):
        title, *lines = section.splitlines()
        if not any(line.startswith("  --") for line in lines):
            sections.append(wrapped(section, width))
            continue
        options: list[tuple[str, str]] = []
        for line in lines:
            name, text = line[:COLUMN].rstrip(), line[COLUMN:]
            if line.startswith("  --"):
                options.append((name, text) if len(name) < COLUMN - 1 else (line, ""))
            else:
                options[-1] = (options[-1][0], f"{options[-1][1]} {text}".strip())
        sections.append("\n".join([title, *(_option(name, text, width) for name, text in options)]))
    return "\n\n".join(sections)


def _option(left: str, text: str, width: int) -> str:
    """One option of a page: its name and, from a column on, what it does."""
    column = COLUMN if width >= COLUMN + 30 else 6
    lines = textwrap.wrap(text, max(width - column, 20), **WHOLE_WORDS)
    first = f"{left:<{column}}{lines.pop(0)}" if len(left) < column - 1 else left
    return "\n".join([first, *(" " * column + line for line in lines)])


def asks_for_all(args: Sequence[str]) -> bool:
    """Whether the options are `--help all`."""
    return any(first in ("-h", "--help") and second == "all" for first, second in pairwise(args))


def pages() -> dict[Path, str]:
    """The generated files and what they should hold, from the parser as it is now."""
    from dino_lightning.cli.plain_options import FILE

    options = {action.dest: action for action in _actions()}
    fit = [
        FIT,
        _section("run", RUN, options),
        _section("data", DATA, options),
        _section("model", MODEL, options),
        _section("also", HELPERS, options),
        _section("trainer", TRAINER, options),
        ALL,
    ]
    evaluate = [
        EVALUATE,
        _section("run", (*RUN[:3], "report", "against"), options),
        _section("data", EVALUATION_DATA, options),
        _section("trainer", TRAINER[1:5], options),
        ALL,
    ]
    return {
        HERE / PAGES["fit"]: "\n".join(fit) + "\n",
        HERE / PAGES["test"]: "\n".join(evaluate) + "\n",
        HERE.parent.parent / "docs" / "options.md": _markdown(options.values()),
        FILE: _listing(options.values()),
    }


def _listing(actions: Iterable[argparse.Action]) -> str:
    """All options but --config, with those that LightningCLI adds to them."""
    from lightning.pytorch import Trainer

    from dino_lightning.cli.plain_options import listing

    added = ("optimizer", "lr_scheduler", "ckpt_path", "weights_only")
    of_lightning = [name for name in added[2:] if name in inspect.signature(Trainer.fit).parameters]
    listed = [each for each in actions if each.dest not in ("config", *added) and not each.dest.endswith(".help")]
    return listing(listed, [*added[:2], *of_lightning])


def _actions() -> Iterator[argparse.Action]:
    from dino_lightning.cli.arguments import fit_parser  # imports PyTorch and Lightning
    from dino_lightning.cli.stored_options import FROM_DATA

    skipped = {*SKIPPED, *(f"model.{name}" for name in FROM_DATA)}
    yield from (action for action in fit_parser()._actions if action.option_strings and action.dest not in skipped)


def _section(title: str, names: Sequence[str], options: dict[str, argparse.Action]) -> str:
    lines = [title]
    for name in names:
        action = options[name]
        left = f"  --{name} {VALUES.get(name, 'VALUE')}".rstrip()
        text = _described(name, action)
        default = _default(action)
        text += f" ({default})" if default and not name.startswith("trainer.") else ""
        lines.append(_option(left, text, WIDTH))
    return "\n".join(lines) + "\n"


def _described(name: str, action: argparse.Action) -> str:
    """The first sentence or two of an option's help."""
    if name in OWN_WORDS:
        return OWN_WORDS[name]
    text = " ".join(str(action.help or "").replace("%(default)s", "").split())
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text).replace("``", "`").strip()
    return re.split(r"(?<=[a-z)\]])\. (?=[A-Z])", text)[0].rstrip(".")


def _default(action: argparse.Action) -> str:
    value: Any = action.default
    if value is None or value is argparse.SUPPRESS:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _markdown(actions: Sequence[argparse.Action] | Any) -> str:
    groups: dict[str, list[argparse.Action]] = {"": [], "data": [], "model": [], "trainer": []}
    for action in actions:
        groups[action.dest.partition(".")[0] if "." in action.dest else ""].append(action)
    titles = {
        "": "Options of this program",
        "data": "data: the dataset and its loading",
        "model": "model: the detector and its training recipe",
        "trainer": "trainer: Lightning's Trainer",
    }
    parts = [
        "# Options\n\nAll options of `fit`, `validate` and `test`, made from the parser by "
        "`python -m dino_lightning.cli.help_pages`. On the command line they are written as `--data.root DIR`, in a "
        "YAML file of `--config` as groups:\n\n```yaml\ntrainer:\n  max_epochs: 50\ndata:\n  batch_size: 2\n"
        "model:\n  lr: 0.0001\n```\n"
    ]
    for group, members in groups.items():
        parts.append(f"## {titles[group]}\n\n| option | default | what it does |\n|---|---|---|")
        for action in members:
            text = _described(action.dest, action).replace("|", "\\|")
            default = _default(action).replace("|", "\\|")
            parts.append(f"| `--{action.dest}` | {f'`{default}`' if default else ''} | {text} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    for path, content in pages().items():
        with atomic_write(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
        print(path)
