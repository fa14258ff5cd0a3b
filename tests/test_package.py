"""What is handed out: the wheel and the source archive, and the containers."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parent.parent
DOCKERFILES = ("Dockerfile", "docs/Dockerfile", "docs/serve/Dockerfile")
WEIGHTS = "dino_lightning/weights/files/rooms_small.pt"


def copied_by(dockerfile):
    """The paths that a Dockerfile copies from its folder."""
    text = (PROJECT / dockerfile).read_text(encoding="utf-8")
    return [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The archives, made of what the Dockerfile copies alone; the wheel is built from the source archive."""
    root = tmp_path_factory.mktemp("source")
    for name in copied_by("Dockerfile"):
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, root / name)
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(output), str(root)]
    subprocess.run(command, check=True, capture_output=True)
    return output


@pytest.mark.slow
def test_the_archives_are_accepted_by_the_index(built):
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())], capture_output=True, text=True
    )
    assert checked.returncode == 0 and checked.stdout.count("PASSED") == 2, checked.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_program_and_is_small(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    configs = {f"dino_lightning/configs/{path.name}" for path in (PROJECT / "configs").iterdir()}
    assert (
        configs | {"dino_lightning/py.typed", "sagemaker_entry/launch.py", "sagemaker_entry/py.typed"} <= sizes.keys()
    )
    assert not [name for name in sizes if name.startswith(("tests/", "docs/", "benchmarks/"))]
    assert sizes.pop(WEIGHTS) < 8e6
    assert sum(sizes.values()) < 3e6


@pytest.mark.slow
def test_the_wheel_runs_from_any_directory(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*command):
        return subprocess.run(command, cwd=work, env=environment, check=True, capture_output=True, text=True).stdout

    version = re.search(r'^version = "(.+)"', (PROJECT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    program = (sys.executable, site / "bin" / "dino-lightning")
    assert run(*program, "--version").strip() == f"dino_lightning {version[1]}"
    place = run(sys.executable, "-c", "import dino_lightning; print(dino_lightning.__file__)")
    assert place.startswith(str(site))
    run(*program, "rooms", "--root", "plans", "--num_train", "8", "--num_val", "4")
    short = ("--trainer.max_epochs=1", "--run_dir=run", "--trainer.accelerator=cpu")
    run(*program, "fit", "--config", "configs/rooms_demo.yaml", "--data.root", "plans", *short)
    assert (work / "run" / "detections.png").is_file()


def test_what_the_dockerfiles_copy_is_there_and_is_sent():
    sent = [line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in copied_by("Dockerfile"):
        assert (PROJECT / name).exists() and name in sent, name
    assert copied_by("docs/Dockerfile") == ["."]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="there is no hadolint")
def test_the_dockerfiles_are_in_order():
    linted = subprocess.run(["hadolint", *DOCKERFILES], cwd=PROJECT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_container_has_a_user_and_no_credentials():
    text = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == "${UID}"
    for name in DOCKERFILES:
        assert not re.search(r"(?i)password|secret|token|aws_access", (PROJECT / name).read_text(encoding="utf-8")), (
            name
        )
    container = json.loads((PROJECT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert ".[dev]" in container["postCreateCommand"]


def test_a_release_is_published_without_a_token():
    text = (PROJECT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "secrets." not in text
    assert jobs["publish"]["needs"] == "build"
