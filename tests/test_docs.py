"""The documentation: its links lead somewhere, its commands and options exist, its Python code runs."""

import ast
import contextlib
import functools
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

import dino_lightning.__main__
from benchmarks.__main__ import NAMES as BENCHMARKS
from sagemaker_entry import launch
from tests.conftest import TINY_ARGS, TINY_SIZES
from tests.inference.test_detector import save_tiny

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"
PAGES = {
    path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
}
ALSO_RUN = ("pip", "pytest", "sagemaker_entry.train", "sagemaker_entry.serve", "dino_lightning.cli.help_pages")
NOT_OURS = ("docs/coming-from.md", "docs/troubleshooting.md")  # first columns: options of others, messages
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
OPTION = re.compile(r"--[A-Za-z][\w.-]*")

COMMANDS = (
    "fit",
    "validate",
    "test",
    "predict",
    "export",
    "convert",
    "weights",
    "inspect",
    "preview",
    "to_coco",
    "rooms",
)
TAKE_OPTIONS_OF_FIT = ("inspect", "preview", "to_coco")
OF_A_JOB = ("status", "attach", "stop", "fetch", "resume", "deploy", "transform")
JOB_COMMANDS = (*OF_A_JOB, "list", "clean", "delete-endpoint")


def prose(text):
    """A page without its fenced blocks."""
    return FENCED.sub("", text)


# ------------------------------------------------------------------ links


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", INLINE.sub("", prose(PAGES[page]))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (PROJECT / page).parent / name if name else PROJECT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}"


def test_the_index_and_the_readme_lead_to_every_page():
    for path in DOCS.rglob("*.md"):
        name = path.relative_to(DOCS).as_posix()
        assert name == "index.md" or f"({name})" in PAGES["docs/index.md"], name
        assert name == "index.md" or f"(docs/{name}" in PAGES["README.md"], name


def test_the_readme_is_short():
    assert len(PAGES["README.md"]) <= 7000


# ------------------------------------------------------------------ commands and options


@functools.cache
def options_of(command):
    """The options that a command's help names; of `fit`, `validate` and `test` all of them."""
    return names_in_help(dino_lightning.__main__.run, command, *(["all"] if command in COMMANDS[:3] else []))


@functools.cache
def options_of_launch(command=""):
    return names_in_help(launch.main, command)


def names_in_help(run, command, *more):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        run([*([command] if command else []), "--help", *more])
    found = set(OPTION.findall(printed.getvalue()))
    assert found, f"{command} --help prints no options"
    return found | {"--help"}


def commands_in(text):
    """Every command line of a page, in words: in fenced blocks, in indented lines and between backticks."""
    lines = [line for _, kind, block in FENCED.findall(text) if kind != "python" for line in block.splitlines()]
    lines += [line for line in prose(text).splitlines() if line.startswith("    ")]
    lines += [" ".join(span.split()) for span in INLINE.findall(prose(text))]
    for line in lines:
        for part in line.split("&&"):
            if "python -m " in part and not part.lstrip().startswith("#"):
                words = shlex.split(part, comments=True)
                yield words[words.index("-m") + 1 :]


def exists(option, known):
    name = option.partition("=")[0]
    return name in known or name.rpartition(".")[0] == "--data.augmentation_options"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists_and_has_its_options(page):
    for module, *words in commands_in(PAGES[page]):
        options = [word for word in words if word.startswith("--")]
        if module == "dino_lightning.fit":
            known = options_of("fit")
        elif module == "dino_lightning":
            assert words[0] in (*COMMANDS, "COMMAND"), f"{page}: {words}"
            known = {"--help"} if words[0] == "COMMAND" else options_of(words[0])
            known = known | options_of("fit") if words[0] in TAKE_OPTIONS_OF_FIT else known
        elif module == "sagemaker_entry.launch":
            of_a_job = bool(words) and words[0] in JOB_COMMANDS
            known = options_of_launch(words[0]) if of_a_job else options_of_launch() | options_of("fit")
        elif module == "benchmarks":
            assert not words or words[0] in BENCHMARKS, f"{page}: {words}"
            continue
        else:
            assert module in ALSO_RUN, f"{page}: {module}"
            continue
        for option in options:
            assert exists(option, known), f"{page}: {module} {' '.join(words)}: there is no {option}"


def test_a_wrong_command_or_option_is_seen():
    page = "    python -m dino_lightning fit --modl.lr 1  # --model.lr\n\nwith `python -m dino_lightning\ntrain` or `a`"
    assert list(commands_in(page)) == [["dino_lightning", "fit", "--modl.lr", "1"], ["dino_lightning", "train"]]
    assert exists("--model.lr=1", options_of("fit")) and not exists("--modl.lr", options_of("fit"))


@pytest.mark.parametrize("page", PAGES)
def test_every_option_between_backticks_exists(page):
    known = options_of_launch().union(*map(options_of, COMMANDS), *map(options_of_launch, JOB_COMMANDS))
    text = prose(PAGES[page])
    if page in NOT_OURS:
        text = re.sub(r"^\| .*? \|", "", text, flags=re.MULTILINE)
    for span in INLINE.findall(text):
        for option in [] if "python -m" in span else OPTION.findall(span):
            assert exists(option, known) or option == "--version", f"{page}: there is no {option}"


def test_every_option_of_launch_is_described():
    for option in options_of_launch() - {"--help", "--model.lr", "--trainer.max_epochs"}:
        assert option in PAGES["docs/sagemaker.md"], option


def test_the_files_of_aws_commands_exist():
    named = re.findall(r"(?:file://|\s)(docs/\S+\.json)", PAGES["docs/sagemaker.md"])
    assert sorted(set(named)) == sorted(path.relative_to(PROJECT).as_posix() for path in (DOCS / "iam").iterdir())
    assert all((PROJECT / name).is_file() for name in named)


def texts_of_the_code():
    """Every text in the code; of f-strings with … for each value."""
    for folder in ("dino_lightning", "sagemaker_entry"):
        for path in (PROJECT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
                elif isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_the_messages_of_the_troubleshooting_page_are_printed_somewhere():
    messages = re.findall(r"^\| `(.+?)` \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    texts = set(texts_of_the_code())
    assert len(messages) > 30
    assert [message for message in messages if not any(message in text for text in texts)] == []


# ------------------------------------------------------------------ Python

# Sizes with which the code of the pages runs in seconds, put into it as text.
SMALLER = {
    r"\b(DINOModule|WithSGD)\(num_classes=": r"\1(**MODULE_SIZES, num_classes=",
    r"\bDINO\(num_classes=": "DINO(**TINY_SIZES, num_classes=",
    r"\bCocoDataModule\(": "CocoDataModule(image_size=64, max_size=96, num_workers=0, ",
    r"\bTrainer\(max_epochs=50": "Trainer(**QUIET, max_epochs=1",
    r'args=\["fit", \*options': 'args=["fit", *TINY_ARGS, *options',
    "max_epochs=20": "max_epochs=1",
    "n_trials=20": "n_trials=2",
}
NAMES = {
    "TINY_SIZES": TINY_SIZES,
    "TINY_ARGS": TINY_ARGS,
    "MODULE_SIZES": {**TINY_SIZES, "backbone_weights": None},
    "QUIET": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
}


def python_of(text):
    """The Python of a page as one program, each line where it is on the page."""
    lines = [""] * (text.count("\n") + 1)
    for block in FENCED.finditer(text):
        if block[2] == "python":
            first = text[: block.start(3)].count("\n")
            code = block[3].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.filterwarnings(
    "ignore:Training from scratch on 8 images",  # ours, and true
    "ignore:Precision bf16-mixed is not supported by the model summary",  # the rest: Lightning's and supervision's
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:OpenCV .* is not installed",
)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page == "docs/lightning.md" else ())
        for page, text in PAGES.items()
        if "```python" in text
    ],
)
def test_the_python_of_a_page_runs(page, rooms, tmp_path, monkeypatch):
    shutil.copytree(rooms, tmp_path / "room_detection_dataset_coco")
    shutil.copyfile(rooms / "val" / "images" / "000001.png", tmp_path / "plan.png")
    save_tiny(tmp_path / "runs" / "rooms" / "checkpoints" / "best.ckpt")
    save_tiny(tmp_path / "JOB" / "model.ckpt")
    monkeypatch.chdir(tmp_path)
    code = python_of(PAGES[page])
    for written, run in SMALLER.items():
        code = re.sub(written, run, code)
    exec(compile(code, page, "exec", dont_inherit=True), {"__name__": "page", **NAMES})
