"""Who may import whom: the layers of the package, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dino_lightning

PACKAGE = Path(dino_lightning.__file__).parent
PROJECT = PACKAGE.parent

# part -> the parts of dino_lightning it may import
ALLOWED = {
    "boxes": set(),
    "files": set(),
    "overlay": set(),
    "detections": {"files", "overlay"},
    "structures": {"boxes", "detections"},
    "model": {"structures", "boxes"},
    "losses": {"structures", "boxes"},
    "data": {"structures", "boxes"},
    "metrics": {"structures", "boxes"},
    "optim": set(),
    "published_layout": set(),
    "checkpoint": {"published_layout"},
    "architecture": {"model", "published_layout"},
    "weights": {"checkpoint"},
    "training_figures": set(),
    "starting_weights": {"architecture", "checkpoint", "model", "weights"},
    "resuming": {"checkpoint", "model"},
    "non_finite": {"files", "losses", "structures"},
    "memory": {"losses", "model", "structures"},
    "module": {
        "boxes", "data", "losses", "metrics", "model", "non_finite", "optim", "resuming", "starting_weights",
        "structures", "training_figures",
    },
    "prediction": {"data", "detections", "files", "module", "structures"},
    "exporting": {"arguments", "checkpoint", "data", "model", "module", "structures"},
    "detector": {"checkpoint", "data", "exporting", "module", "prediction", "structures"},
    "callbacks": {
        "boxes", "checkpoint", "data", "files", "memory", "metrics", "module", "overlay", "resuming", "structures",
    },
    "report": {"data", "files", "metrics", "structures"},
    "options": set(),
    "arguments": {"checkpoint", "data", "files", "module", "options"},
    "expected_errors": {"arguments", "checkpoint", "data", "losses", "memory"},
    "run_folder": {"callbacks"},
    "cli": {
        "arguments", "callbacks", "checkpoint", "data", "expected_errors", "memory", "module", "options", "report",
        "resuming", "run_folder", "starting_weights",
    },
    "predict": {"arguments", "cli", "data", "detector", "expected_errors", "module", "prediction"},
    "export": {"arguments", "detector", "expected_errors", "exporting", "files", "module"},
    "convert": {"architecture", "checkpoint", "files", "module", "published_layout", "weights"},
    "fit": {"arguments", "cli", "data"},
    "health": {"cli", "data", "expected_errors", "files", "metrics"},
    "preview": {"arguments", "boxes", "callbacks", "cli", "data", "expected_errors", "structures"},
    "__main__": {"cli", "convert", "data", "export", "fit", "health", "predict", "preview"},
    "__init__": {"data", "detector", "losses", "metrics", "model", "module", "structures"},
}  # fmt: skip
MAY_USE_LIGHTNING = {
    "arguments.py", "cli.py", "data/datamodule.py", "expected_errors.py", "fit.py", "module.py", "options.py",
    "predict.py", "prediction/loop.py", "resuming.py", "run_folder.py", "__main__.py",
}  # fmt: skip

TRITON = "model/deformable_attention/triton_kernels.py"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Run in the container, where neither boto3 nor the SageMaker SDK may be needed.
IN_CONTAINER = (
    "artifacts", "channels", "environment", "failure", "inference", "install", "instances", "job", "local", "manifest",
    "peers", "problem", "progress", "ranks", "settings", "source", "train", "worker",
)  # fmt: skip
ON_LAPTOP = (
    "account", "dataset_pack", "dataset_upload", "follow", "jobs", "launch", "plan", "preflight", "start", "submit",
    "training",
)  # fmt: skip

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_direction_of_imports(file):
    part = file.split("/")[0].removesuffix(".py")
    for name in imports(PACKAGE / file):
        top, *rest = name.split(".")
        if top == "dino_lightning" and rest:
            assert rest[0] == part or rest[0] in ALLOWED[part] or rest[0][0].isupper(), f"{file} imports {name}"
        if top in ("lightning", "pytorch_lightning"):
            assert file in MAY_USE_LIGHTNING or part == "callbacks", f"{file} imports {name}"
        assert top not in ("boto3", "sagemaker", "sagemaker_entry"), f"{file} imports {name}"
        # loaded at the first call on a device, see fused.py; tests/model/test_deformable_attention.py tries it out
        assert top != "triton" or file == TRITON, f"{file} imports {name}"


def test_every_file_of_sagemaker_entry_has_its_side():
    files = {path.stem for path in (PROJECT / "sagemaker_entry").glob("*.py")} - {"__init__"}
    assert files == set(IN_CONTAINER) | set(ON_LAPTOP)


@pytest.mark.parametrize("name", IN_CONTAINER)
def test_the_container_needs_no_aws_package(name):
    for imported in imports(PROJECT / "sagemaker_entry" / f"{name}.py"):
        top, *rest = imported.split(".")
        assert top not in ("boto3", "botocore", "sagemaker"), f"{name} imports {imported}"
        assert top != "sagemaker_entry" or not rest or rest[0] in IN_CONTAINER, f"{name} imports {imported}"


@pytest.mark.parametrize("name", ["dataset_pack", "launch", "plan", "training"])
def test_a_local_run_needs_no_aws_package(name):
    for imported in imports(PROJECT / "sagemaker_entry" / f"{name}.py"):
        assert imported.split(".")[0] not in ("boto3", "botocore", "sagemaker"), f"{name} imports {imported}"


def test_the_entry_imports_nothing_that_has_yet_to_be_installed():
    code = (
        "import sys, sagemaker_entry.train; print(sorted(set(sys.modules) & {'torch', 'lightning', 'yaml', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == "[]"


def test_the_rule_sees_a_violation(tmp_path):
    (tmp_path / "bad.py").write_text("def f():\n    from dino_lightning.data import coco\n")
    assert "dino_lightning.data" in set(imports(tmp_path / "bad.py"))
