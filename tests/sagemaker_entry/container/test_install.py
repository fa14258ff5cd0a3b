"""Installing what the image lacks: with uv, pip or ensurepip, and one sentence about what is missing otherwise."""

import http.server
import re
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dino_lightning.export.package_code import FROM_THE_IMAGE, requirements
from sagemaker_entry.container import install as installing
from sagemaker_entry.container.install import TESTED, constraints
from sagemaker_entry.protocol.problem import Problem

PROJECT = Path(__file__).parents[3]
LEFT_TO_THE_IMAGE = {"numpy", "pillow", "pyyaml", "jinja2", "tqdm", "fsspec", "filelock"}
INSTALL = """
import subprocess, sys
from pathlib import Path
from sagemaker_entry.container.install import install
from sagemaker_entry.protocol.problem import Problem
def run(command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
try:
    install(Path(sys.argv[1]), run, wheels=Path(sys.argv[2]) if sys.argv[2:] else None)
except Problem as problem:
    sys.exit(f"PROBLEM: {problem}")
"""


def make_wheel(folder, name="a_package", version="1.0"):
    """The smallest wheel that there can be."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


class Image:
    """A Python as an image may have it, and a folder of code with requirements."""

    def __init__(self, folder, python):
        self.folder, self.python = folder, python
        (folder / "bin").mkdir(parents=True)
        (folder / "code").mkdir()
        self.require("a-package>=1")

    def require(self, line):
        (self.folder / "code" / "requirements.txt").write_text(f"{line}\n")

    def install(self, *wheels, **variables):
        """(exit code, output) of an installation with nothing but this image's programs and these variables."""
        environment = {"PATH": str(self.folder / "bin"), "PYTHONPATH": str(PROJECT), "PIP_CONFIG_FILE": "/dev/null"}
        done = subprocess.run(
            [self.python, "-c", INSTALL, self.folder / "code", *wheels],
            env=environment | {"PIP_RETRIES": "0"} | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def has(self, module):
        return subprocess.run([self.python, "-c", f"import {module}"], capture_output=True).returncode == 0


@pytest.fixture
def bare(tmp_path):
    """An image without pip and without uv."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    return Image(tmp_path / "image", tmp_path / "venv" / "bin" / "python")


@pytest.fixture
def with_pip(tmp_path):
    """An image with pip: this Python itself, into which no test installs anything."""
    pytest.importorskip("pip")
    return Image(tmp_path / "image", Path(sys.executable))


@pytest.fixture
def index():
    """A package index on this machine that answers each request with the status that a test sets."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(self.server.status)
            self.end_headers()

        do_CONNECT = do_GET  # as a proxy is asked

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def uv_that(folder, text, code):
    """A program `uv` that writes down its arguments and prints what the real one printed."""
    uv = folder / "bin" / "uv"
    asked = folder / "asked"
    uv.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\npathlib.Path({str(asked)!r}).write_text(' '.join(sys.argv[1:]))\n"
        f"print({text!r})\nsys.exit({code})\n"
    )
    uv.chmod(0o755)


@pytest.mark.slow
def test_without_uv_and_pip_the_pip_of_python_itself_is_taken(bare, tmp_path):
    make_wheel(tmp_path / "wheels")
    assert not bare.has("pip")
    code, output = bare.install(tmp_path / "wheels")
    assert (code, output) == (0, "")
    assert bare.has("a_package")


def test_without_any_installer_it_is_said(bare):
    (bare.folder / "ensurepip.py").write_text("raise SystemExit('No module named ensurepip')")  # as Debian splits it
    code, output = bare.install()
    assert code == 1
    assert "PROBLEM: The image has nothing to install packages with: no uv, no pip, and ensurepip failed" in output
    assert "(No module named ensurepip)" in output


def test_uv_is_taken_where_the_image_has_it_and_told_of_pips_index(bare):
    uv_that(bare.folder, "", 0)
    assert bare.install(PIP_INDEX_URL="http://mine/simple") == (0, "")
    asked = (bare.folder / "asked").read_text()
    assert asked.startswith(f"pip install --python {bare.python} --index-url http://mine/simple -r ")
    assert "--no-index" not in asked and not bare.has("pip")


UV_SAID = {  # uv 0.13.9, to the letter
    "dns": (
        "error: Failed to fetch: http://nothing.invalid/simple/foo/\n"
        "  cause: error sending request for url (http://nothing.invalid/simple/foo/)\n  cause: dns error\n",
        "uv could not reach the package index (dns error):",
    ),
    "proxy": (
        "error: No solution found when resolving dependencies\n  cause: Because foo was not found in the package "
        "registry and you require foo, we can conclude that your requirements are unsatisfiable.\n\nhint: An index "
        "(http://127.0.0.1:8403/simple) returned a 403 Forbidden error. Check that the index URL is correct.",
        "uv could not reach the package index (403 Forbidden error",
    ),
    "unknown": (
        "error: No solution found when resolving dependencies\n  cause: Because foo was not found in the package "
        "registry and you require foo, we can conclude that your requirements are unsatisfiable.",
        "uv reached the package index, but a requirement cannot be met with Python 3",
    ),
    "form": (
        'error: Failed to parse: `foo=>3`\n  cause: no such comparison operator "=>"',
        "but a requirement cannot be met",
    ),
    "disk": ("error: No space left on device (os error 28)", "uv could not install the requirements (No space left"),
}


@pytest.mark.parametrize("case", UV_SAID)
def test_what_uv_says_is_understood(bare, case):
    text, sentence = UV_SAID[case]
    uv_that(bare.folder, text, 1)
    code, output = bare.install()
    assert code == 1
    (problem,) = [line for line in output.splitlines() if line.startswith("PROBLEM: ")]
    assert sentence in problem
    assert ("--network-isolation" in problem) == (case in ("dns", "proxy"))


def test_an_index_that_cannot_be_reached_is_no_wrong_requirement(with_pip):
    code, output = with_pip.install(PIP_INDEX_URL=f"http://127.0.0.1:{closed_port()}/simple")
    assert code == 1
    assert "PROBLEM: pip could not reach the package index (" in output
    assert "refused): the container needs a network" in output


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (403, "pip could not reach the package index (403 Client Error: Forbidden for url"),
        (404, "pip reached the package index, but a requirement cannot be met with Python 3"),
    ],
)
def test_an_index_that_refuses_is_told_from_one_that_has_no_such_package(with_pip, index, status, sentence):
    index.status = status
    code, output = with_pip.install(PIP_INDEX_URL=f"{index.address}/simple")
    assert code == 1
    assert f"PROBLEM: {sentence}" in output


@pytest.mark.slow
def test_a_proxy_that_refuses_is_a_missing_network(with_pip, index):
    index.status = 403
    code, output = with_pip.install(PIP_INDEX_URL="https://index.invalid/simple", HTTPS_PROXY=index.address)
    assert code == 1
    assert "PROBLEM: pip could not reach the package index (" in output


def test_a_requirement_of_the_wrong_form_is_named(with_pip):
    with_pip.require("a-package=>1")
    code, output = with_pip.install(PIP_NO_INDEX="1")
    assert code == 1
    assert "a requirement cannot be met" in output and "Invalid requirement: 'a-package=>1'" in output


def test_packages_that_came_along_and_do_not_suffice(with_pip, tmp_path):
    make_wheel(tmp_path / "wheels", "another")
    code, output = with_pip.install(tmp_path / "wheels")
    assert code == 1
    assert "PROBLEM: pip could not install the packages that came with the job (" in output
    assert "for another Python than this image's" in output


# ------------------------------------------------------------------ the tested versions


def pins():
    lines = [Requirement(line) for line in TESTED.read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in lines}


def test_the_tested_versions_are_those_that_the_package_allows():
    wanted = [Requirement(line) for line in requirements("timm/resnet18", ["albumentations", "mlflow"])]
    names = {canonicalize_name(requirement.name) for requirement in wanted}
    assert names - pins().keys() == LEFT_TO_THE_IMAGE
    assert not pins().keys() & {*LEFT_TO_THE_IMAGE, *FROM_THE_IMAGE}
    for requirement in wanted:
        pin = pins().get(canonicalize_name(requirement.name))
        if pin is not None:
            (version,) = [specifier.version for specifier in pin.specifier]
            assert requirement.specifier.contains(version), f"{pin} is not {requirement}"


def test_every_pin_is_one_version_and_they_are_in_order():
    for pin in pins().values():
        assert re.fullmatch(r"==[\d.]+", str(pin.specifier)), pin
    assert list(pins()) == sorted(pins())


def test_lightning_comes_in_one_version_under_both_names():
    assert pins()["lightning"].specifier == pins()["pytorch-lightning"].specifier


def test_the_images_torch_and_the_tested_versions_are_kept():
    import torch

    lines = constraints()
    assert lines[0].partition("+")[0] == f"torch=={torch.__version__.partition('+')[0]}"
    assert lines[1].startswith("torchvision==")
    assert any(line.startswith("lightning==") for line in lines) and not any(line.startswith("#") for line in lines)


def test_nothing_asked_for_is_nothing_done(tmp_path):
    def run(command):
        raise AssertionError(command)

    installing.install(tmp_path, run)
    (tmp_path / "requirements.txt").write_text("lightning\n")
    with pytest.raises(Problem, match=r"could not install the requirements \(no such thing\)"):
        installing.install(
            tmp_path, lambda command: subprocess.CompletedProcess(command, 1, "x\nERROR: no such thing\n"), environ={}
        )
