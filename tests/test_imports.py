"""Who may import whom, read from the source: eight layers in `dino_lightning`, three in `sagemaker_entry`.

A file imports lower layers and its own room, nothing else.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dino_lightning

PACKAGE = Path(dino_lightning.__file__).parent
PROJECT = PACKAGE.parent

LAYERS = (
    "boxes errors files console interrupts visualization floor_plans",
    "detections structures kernel_trial",
    "model losses data metrics",
    "weights inspection report",
    "training",
    "callbacks export",
    "inference",
    "cli",
    "fit __main__ __init__",  # entry files
)
SAGEMAKER_LAYERS = ("__init__ protocol", "laptop container", "launch train inference", "serve")
MAY_USE_LIGHTNING = ("training", "data/datamodule.py", "data/split_loaders.py", "callbacks", "cli", "inference")
MAY_USE_AWS = ("laptop",)
TRITON = (
    "model/deformable_attention/triton_parts.py",
    "model/deformable_attention/triton_forward.py",
    "model/deformable_attention/triton_backward.py",
    "model/residual_norm_kernels.py",
    "losses/assignment_kernel.py",
)

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
SAGEMAKER_FILES = sorted(
    path.relative_to(PROJECT / "sagemaker_entry").as_posix() for path in (PROJECT / "sagemaker_entry").rglob("*.py")
)


def room(file):
    return file.split("/")[0].removesuffix(".py")


def layer(name, layers):
    found = [number for number, rooms in enumerate(layers) if name in rooms.split()]
    assert len(found) == 1, f"{name} has no place in the layers"
    return found[0]


def imports(path):
    """The modules that a file imports; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path, package):
    """The rooms of a package that a file imports."""
    names = (name.split(".") for name in imports(path))
    parts = {parts[1] for parts in names if parts[0] == package and len(parts) > 1}
    return {room(part) for part in parts if part not in getattr(dino_lightning, "__all__", ())}


def within(file, places):
    return any(file == place or file.startswith(f"{place}/") for place in places)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_lower_layers_and_its_own_room(file):
    own = layer(room(file), LAYERS)
    for other in rooms_imported(PACKAGE / file, "dino_lightning") - {room(file)}:
        assert layer(other, LAYERS) < own, f"{file} imports {other}"
    for name in imports(PACKAGE / file):
        top = name.split(".")[0]
        assert top not in ("lightning", "pytorch_lightning") or within(file, MAY_USE_LIGHTNING), f"{file}: {name}"
        assert top not in ("boto3", "sagemaker", "sagemaker_entry"), f"{file} imports {name}"
        # loaded at the first call on a device; tests/model/test_deformable_attention.py and
        # tests/losses/test_assignment.py try it out
        assert top != "triton" or file in TRITON, f"{file} imports {name}"


@pytest.mark.parametrize("file", SAGEMAKER_FILES)
def test_the_laptop_and_the_container_share_the_protocol_only(file):
    own = layer(room(file), SAGEMAKER_LAYERS)
    for other in rooms_imported(PROJECT / "sagemaker_entry" / file, "sagemaker_entry") - {room(file)}:
        assert layer(other, SAGEMAKER_LAYERS) < own, f"{file} imports {other}"
    for name in imports(PROJECT / "sagemaker_entry" / file):
        aws = name.split(".")[0] in ("boto3", "botocore", "sagemaker")
        assert not aws or within(file, MAY_USE_AWS), f"{file} imports {name}"
        assert file != "train.py" or not name.startswith("sagemaker_entry.laptop"), f"{file} imports {name}"


@pytest.mark.parametrize("folder", ["dino_lightning", "sagemaker_entry"])
def test_there_is_no_circle(folder):
    files = {
        ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (PROJECT / folder).rglob("*.py")
    }
    wanted = {
        name: {other for other in imports(path) if other in files and other != name}
        for name, path in files.items()
        if path.name != "__init__.py"
    }
    while wanted:
        leaves = {name for name, others in wanted.items() if not others & wanted.keys()}
        assert leaves, f"these import each other in a circle: {sorted(wanted)}"
        wanted = {name: others for name, others in wanted.items() if name not in leaves}


def test_the_entry_imports_nothing_that_has_yet_to_be_installed():
    code = (
        "import sys, sagemaker_entry.train; print(sorted(set(sys.modules) & {'torch', 'lightning', 'yaml', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == "[]"


def test_the_rule_sees_a_violation(tmp_path):
    (tmp_path / "bad.py").write_text("def f():\n    from dino_lightning.data import coco\n")
    assert rooms_imported(tmp_path / "bad.py", "dino_lightning") == {"data"}
