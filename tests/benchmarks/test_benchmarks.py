"""The measurements run, small; what they compare agrees, or they refuse to measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import match, plain
from dino_lightning.losses import Criterion

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("count", [1, 10, 60])
def test_the_losses_equal_those_computed_layer_by_layer(count):
    output, targets = match.example(count, "cpu")
    one, other = match.published(output, targets), match.ours(Criterion(), output, targets)
    torch.testing.assert_close(other[0], one[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(other[1:], one[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=float(1e-5 * theirs.abs().max()))


def test_the_baseline_notices_a_difference():
    output, targets = match.example(10, "cpu")
    assert not torch.isclose(plain.total_loss(output, targets), Criterion(weight_bbox=5.1)(output, targets)["loss"])


def run(tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("sync", "--size", "96x96", "--batch_size", "1"), marks=pytest.mark.slow),
        ("eval", "--images", "20", "--detections", "30", "--classes", "3"),
    ],
    ids=["sync", "eval"],
)
def test_a_small_measurement_writes_its_settings_and_versions(tmp_path, arguments):
    path = tmp_path / "numbers.json"
    printed = run(tmp_path, *arguments, "--output", str(path))
    numbers = json.loads(path.read_text())
    assert printed and numbers["results"]
    assert torch.__version__.startswith(numbers["environment"]["versions"]["torch"])
    if arguments[0] == "sync":
        assert numbers["results"]["dino_lightning"]["synchronisations"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("match", "--rounds", "5"),
        ("step", "--size", "96x96"),
        ("ddp", "--rounds", "1", "--steps", "1", "--side", "96", "--batch_size", "1"),
        ("data", "--rounds", "5", "--images", "1"),
        ("op", "--rounds", "5"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_longer_measurements_run(tmp_path, arguments):
    assert run(tmp_path, *arguments)


@pytest.mark.slow
def test_a_race_of_seconds_gives_numbers_for_each_contestant_and_a_picture(rooms, tmp_path):
    """The contestants train and are evaluated; who wins, such seconds cannot say."""
    output, picture = tmp_path / "race.json", tmp_path / "race.png"
    printed = run(
        tmp_path, "race", "--data", str(rooms), "--minutes", "0.02", "--picture", str(picture), "--output", str(output)
    )
    results = json.loads(output.read_text())["results"]
    assert set(results) == {"ours", "faster_rcnn", "ssdlite"}
    for moments in results.values():
        assert all(0 <= value <= 1 for moment in moments for value in moment["values"].values())
        views, steps = [moment["views"] for moment in moments], [moment["step"] for moment in moments]
        assert views == [1] * (len(moments) - 1) + [8] and steps[-2] == steps[-1]  # both ways at the end
    assert "contestant" in printed and picture.read_bytes().startswith(b"\x89PNG")
