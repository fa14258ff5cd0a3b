"""`python -m dino_lightning inspect` as a user calls it: exit codes, files, and a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dino_lightning.__main__ import run
from tests.data.small_coco import annotation, write_json
from tests.inspection.faults import FAULTS, TRAIN, break_dataset, write_dataset

HOSTILE = "<img src=//evil.example/x onerror=alert(1)>\"'&{{7*7}}\x1b[2J"


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path):
    write_dataset(tmp_path / "plans")
    return tmp_path / "plans"


def warn(root: Path) -> None:
    """A dataset that trains, with one warning."""
    content = json.loads((root / TRAIN).read_text())
    content["annotations"].append(annotation(90, 1, 1, [-5, 5, 20, 20]))
    write_json(root / TRAIN, content)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_a_sound_dataset_ends_with_0_and_says_where_the_report_is(root, capsys):
    assert run(["inspect", "--data.root", str(root)]) == 0
    printed = capsys.readouterr()
    assert "Findings: 0 errors, 0 warnings, 0 notes" in printed.out
    assert "inspection/health.html" in printed.out and "inspection/health.json" in printed.out
    assert "Reading train images" in printed.err and "Reading" not in printed.out
    assert sorted(path.name for path in Path("inspection").iterdir()) == ["health.html", "health.json"]


def test_errors_end_with_1(root, capsys):
    (root / "train/images/2.png").unlink()
    assert run(["inspect", f"--data.root={root}", "--output", "here/report"]) == 1
    printed = capsys.readouterr().out
    assert "ERROR   train: 1 x images listed but absent" in printed and "image 2, 2.png" in printed
    report = json.loads(Path("here/report/health.json").read_text())
    assert report["counts"] == {"error": 1, "warning": 0, "note": 0}
    assert report["findings"][0]["cases"] == [
        {"image_id": 2, "annotation_id": None, "file_name": "2.png", "detail": ""}
    ]


def test_warnings_end_with_1_only_if_strict(root, capsys):
    warn(root)
    assert run(["inspect", "--data.root", str(root)]) == 0
    assert "WARNING train: 1 x boxes that stick out" in capsys.readouterr().out
    assert run(["inspect", "--data.root", str(root), "--strict"]) == 1


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--data.rot", "x"], "There is no option --data.rot. Did you mean --data.root?"),
        (["--data.root", "plans", "--data.image_size", "big"], "image_size"),
        (["--data.root", "plans", "--data.image_size", "0"], "must be at least 1"),
        (["--config", "none.yaml"], "none.yaml"),
        ([], "data.root"),
    ],
)
def test_bad_options_end_with_2(root, args, sentence, capsys):
    assert run(["inspect", *args]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and sentence in line


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "the dataset folder does not exist"),
        (lambda path: path.mkdir(), "no annotation file found"),
        (lambda path: path.write_text("x"), "is a file. Give its folder"),
    ],
)
def test_a_hopeless_dataset_ends_with_1_and_one_sentence(tmp_path, make, sentence, capsys):
    make(tmp_path / "nothing")
    assert run(["inspect", "--data.root", "nothing"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: nothing: ") and sentence in line
    assert not Path("inspection").exists()


def test_an_output_that_cannot_be_written_is_one_sentence(root, capsys):
    Path("taken").write_text("a file")
    assert run(["inspect", "--data.root", str(root), "--output", "taken"]) == 1
    assert "error: taken cannot be written" in capsys.readouterr().err


def test_options_and_configuration_of_fit_are_understood(root, capsys):
    Path("some.yaml").write_text(
        "data:\n  root: plans\n  image_size: 40\n  augmentation: none\nmodel:\n  num_queries: 1\n"
    )
    content = json.loads((root / TRAIN).read_text())
    content["annotations"][0]["bbox"] = [5, 5, 3, 9]
    write_json(root / "elsewhere.json", content)
    arguments = ["inspect", "--config", "some.yaml", "--data.train_annotations", "elsewhere.json"]
    assert run([*arguments, "--data.train_images", "train/images", "--trainer.max_epochs=3"]) == 0
    printed = capsys.readouterr().out
    assert "8 x more boxes" not in printed and "4 x more boxes in an image than the model has queries" in printed
    assert "boxes of less than 4 pixels" not in printed
    assert run([*arguments, "--data.train_images", "train/images", "--data.image_size=39"]) == 0
    assert "1 x boxes of less than 4 pixels" in capsys.readouterr().out
    assert run([*arguments, "--data.train_images", "train/images", "--data.fixed_size=39"]) == 0
    assert " x boxes of less than 4 pixels" in capsys.readouterr().out


def test_help_lists_its_own_options(capsys):
    with pytest.raises(SystemExit) as caught:
        run(["inspect", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "--strict" in printed and "--output" in printed and "--data.root" in printed


@pytest.mark.slow
def test_it_runs_as_a_command_where_the_terminal_lacks_characters(root):
    break_dataset(root, FAULTS["category unused"], FAULTS["file name no utf-8"])
    content = json.loads((root / TRAIN).read_text())
    content["categories"][-1]["name"] = "\u5e73\u9762\u56f3"
    write_json(root / TRAIN, content)
    done = subprocess.run(
        [sys.executable, "-m", "dino_lightning", "inspect", "--data.root", str(root)],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"caf?.png" in done.stdout and b"category 8 (???)" in done.stdout


def test_the_page_loads_nothing_and_names_do_no_harm(root, capsys):
    content = json.loads((root / TRAIN).read_text())
    content["categories"] = [{"id": 1, "name": HOSTILE}, {"id": 2, "name": "bath"}]
    name = "<script src=x>'&\".png"
    (root / "train/images/3.png").rename(root / "train/images" / name)
    content["images"][2]["file_name"] = name
    content["annotations"][4]["bbox"] = [-5, 0, 70, 30]  # an image with a finding
    write_json(root / TRAIN, content)
    assert run(["inspect", "--data.root", str(root)]) == 1  # the validation split has the other names
    assert "\x1b" not in capsys.readouterr().out

    text = Path("inspection/health.html").read_text()
    page = Page(text)
    assert HOSTILE.replace("\x1b", "?") in page.texts
    assert any(name in part for part in page.texts)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "svg", "video", "audio"}
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") or key in ("href", "srcset", "style", "action") for key in attributes)
        assert "src" not in attributes or (tag == "img" and attributes["src"].startswith("data:image/"))
        assert tag != "img" or attributes["alt"]
    without_pictures = re.sub(r'src="data:image/[a-z]+;base64,[^"]*"', "", text)
    (style,) = re.findall(r"<style>(.*?)</style>", without_pictures, re.DOTALL)
    assert not re.search(r"https?:|//|url\(|@import", style)
    assert "http://" not in without_pictures and "https://" not in without_pictures
    policy = next(attributes for tag, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy["content"]


def test_the_page_shows_plots_samples_and_the_case_marked(root):
    warn(root)
    assert run(["inspect", "--data.root", str(root)]) == 0
    page = Page(Path("inspection/health.html").read_text())
    pictures = {attributes["alt"]: attributes["src"] for tag, attributes in page.tags if tag == "img"}
    for plot in ("boxes in an image", "box sizes", "Width and height of images", "Boxes of each class"):
        assert any(plot in alt for alt in pictures)
    (case,) = [source for alt, source in pictures.items() if "20 x 20 at -5, 5 in 40 x 30" in alt]
    drawn = Image.open(io.BytesIO(base64.b64decode(case.partition(",")[2]))).convert("RGB")
    assert drawn.size == (160, 120)  # four times as large, for a case
    red, green, _ = drawn.getpixel((60, 60))  # the right side of the case's box
    assert red > green + 60
    assert sum(alt.endswith((" train, 1 box", " val, 1 box")) for alt in pictures) == 6  # samples of both splits


def test_fit_refuses_what_inspect_calls_an_error_and_names_the_command(root, capsys):
    (root / "train/images/2.png").unlink()
    small = ["--data.num_workers=0", "--trainer.accelerator=cpu", "--model.backbone_weights=null"]
    assert run(["fit", "--data.root", str(root), "--data.val_images", "val/images", *small]) == 1
    error = capsys.readouterr().err
    assert "1 of 4 images listed do not exist, the first being image 2" in error
    assert f"python -m dino_lightning inspect --data.root {root} --data.val_images val/images" in error
