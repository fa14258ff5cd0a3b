"""The wheels of a job without a network: those that the image's Python needs, whatever Python makes them."""

import subprocess
import sys
import zipfile

import pytest

from sagemaker_entry.laptop import wheelhouse as module
from sagemaker_entry.laptop.wheelhouse import pins_for, wheelhouse
from sagemaker_entry.protocol.problem import Problem

pytest.importorskip("pip")


def publish(folder, name, version, *needs, tag="py3-none-any", vendored=False):
    """Put a wheel into a folder that serves as the package index."""
    info = f"{name}-{version}.dist-info"
    headers = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        if vendored:  # as setuptools has it
            wheel.writestr(f"{name}/_vendor/other-1.dist-info/METADATA", "Name: other\nRequires-Dist: never\n")
        wheel.writestr(f"{info}/METADATA", "\n".join(headers) + "\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder as the only package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_what_the_image_needs_is_downloaded_but_for_its_torch(index):
    publish(index, "lightning", "2.6.6", "torch>=2", "common>=1", vendored=True)
    publish(index, "lightning", "99.0")  # newer than what was tested
    publish(index, "fast", "1.0", "common<2", tag="cp313-cp313-manylinux_2_28_x86_64")
    publish(index, "fast", "1.0", tag="cp313-cp313-macosx_11_0_arm64")
    for version in ("1.5", "2.0"):
        publish(index, "common", version, 'linux-only; sys_platform == "linux"', 'mac-only; sys_platform == "darwin"')
    publish(index, "linux_only", "1.0", 'old; python_version < "3.13"')
    publish(index, "extra_part", "1.0")
    publish(index, "with_extra", "1.0", 'extra-part; extra == "more"', 'other-part; extra == "other"')
    made = wheelhouse(["lightning>=2.5", "fast>=1", "with-extra[more]>=1"], "3.13")
    assert sorted(path.name for path in made.iterdir()) == [
        "common-1.5-py3-none-any.whl",
        "extra_part-1.0-py3-none-any.whl",
        "fast-1.0-cp313-cp313-manylinux_2_28_x86_64.whl",
        "lightning-2.6.6-py3-none-any.whl",
        "linux_only-1.0-py3-none-any.whl",
        "with_extra-1.0-py3-none-any.whl",
    ]
    for path in index.iterdir():
        path.unlink()
    assert wheelhouse(["lightning>=2.5", "fast>=1", "with-extra[more]>=1"], "3.13") == made  # kept


def test_a_wheel_that_cannot_be_had_is_said_and_nothing_is_kept(index, tmp_path):
    publish(index, "fast", "1.0", tag="cp313-cp313-manylinux_2_28_x86_64")
    with pytest.raises(Problem) as caught:
        wheelhouse(["fast>=1"], "3.12")
    sentence = str(caught.value)
    assert "No matching distribution found for fast>=1" in sentence
    assert "no wheel for Python 3.12 on Linux x86_64" in sentence
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_without_pip_it_is_said(index, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(Problem, match="python -m ensurepip"):
        wheelhouse(["fast>=1"], "3.12")


def test_the_pins_for_are_those_for_the_images_python():
    assert any(line.startswith("scipy==") for line in pins_for("3.12"))
    assert not any(line.startswith("scipy==") for line in pins_for("3.10"))
    assert not any(";" in line for line in pins_for("3.12"))


@pytest.mark.slow
def test_the_wheels_install_without_an_index(index, tmp_path):
    """With this Python's own version, as the container does it."""
    publish(index, "lightning", "2.6.6", "common>=1")
    publish(index, "common", "1.5")
    made = wheelhouse(["lightning>=2.5"], f"{sys.version_info.major}.{sys.version_info.minor}")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(made), "--no-warn-conflicts"]
    done = subprocess.run([*command, "--target", str(tmp_path / "site"), "lightning>=2.5"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "common-1.5.dist-info").is_dir()
