"""What an installed wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_runs_from_any_directory(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(PROJECT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "dino_lightning/configs/rooms_demo.yaml" in names
    assert "dino_lightning/py.typed" in names
    assert {"sagemaker_entry/launch.py", "sagemaker_entry/train.py", "sagemaker_entry/py.typed"} <= set(names)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import dino_lightning.cli.config_files as a; "
        "print(a.__file__, a.config_path('rooms_demo.yaml'))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert printed.count(str(site)) == 2
