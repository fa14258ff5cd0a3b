"""Who may import whom: the layers of the package, read from the source."""

import ast
from pathlib import Path

import pytest

import dino_lightning

PACKAGE = Path(dino_lightning.__file__).parent
PROJECT = PACKAGE.parent

# part -> the parts of dino_lightning it may import
ALLOWED = {
    "boxes": set(),
    "structures": {"boxes"},
    "model": {"structures", "boxes"},
    "losses": {"structures", "boxes"},
    "data": {"structures", "boxes"},
    "metrics": {"structures", "boxes"},
    "optim": set(),
    "checkpoint": {"model", "structures", "boxes"},
    "module": {"model", "losses", "data", "metrics", "optim", "checkpoint", "structures", "boxes"},
    "callbacks": {"module", "structures", "boxes", "metrics"},
    "arguments": {"checkpoint", "data", "module"},
    "cli": {"arguments", "callbacks", "checkpoint", "data", "losses", "module"},
    "fit": {"arguments", "cli", "data"},
    "__main__": {"cli", "fit", "data"},
    "predict": {"checkpoint", "module"},
    "__init__": {"data", "losses", "metrics", "model", "module", "predict", "structures"},
}
MAY_USE_LIGHTNING = {"module.py", "data/datamodule.py", "arguments.py", "cli.py", "fit.py", "__main__.py"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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
        assert top not in ("boto3", "sagemaker", "triton", "sagemaker_entry"), f"{file} imports {name}"


def test_the_rule_sees_a_violation(tmp_path):
    (tmp_path / "bad.py").write_text("def f():\n    from dino_lightning.data import coco\n")
    assert "dino_lightning.data" in set(imports(tmp_path / "bad.py"))
