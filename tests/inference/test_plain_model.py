"""A trained model where Lightning is not installed, as on a server: the same detections."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from dino_lightning import load_detector
from dino_lightning.export.package_code import NOT_SERVED
from dino_lightning.inference.detector import load_plain_model
from tests.inference.test_detector import save_tiny

# A process in which the packages that serving does not need are not installed.
WITHOUT = textwrap.dedent(
    """
    import json, sys
    for name in json.loads(sys.argv[1]):
        sys.modules[name] = None  # "import name" now fails as if it were not there
    from dino_lightning import load_detector
    import sagemaker_entry.inference, sagemaker_entry.serve
    detector = load_detector(sys.argv[2], "cpu")
    try:
        detector.module
    except TypeError as error:
        message = str(error)
    (found,) = detector.detect([sys.argv[3]], threshold=0.0)
    print(json.dumps({"kind": type(detector.model).__name__, "found": found.to_coco(1), "message": message}))
    """
)


@pytest.mark.parametrize(
    "settings", [{}, {"stretch_to": 64, "nms_iou_threshold": 0.5, "class_names": ["wall", "door"]}]
)
def test_a_server_needs_neither_lightning_nor_what_draws_and_evaluates(rooms, tmp_path, settings):
    path = save_tiny(tmp_path / "m.ckpt", image_size=64, max_size=96, **settings)
    picture = rooms / "val" / "images" / "000001.png"
    modules = [name.replace("-", "_") for name in NOT_SERVED] + ["lightning_utilities", "pytorch_lightning"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(modules), str(path), str(picture)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["kind"] == "PlainModel"
    assert answer["message"].startswith("A DINOModule needs Lightning")
    (expected,) = load_detector(path, "cpu").detect([picture], threshold=0.0)
    assert answer["found"] == expected.to_coco(1)
    assert len(answer["found"]) > 0


def test_the_plain_model_has_all_entries_of_a_checkpoint_and_its_threshold(tmp_path):
    path = save_tiny(tmp_path / "m.ckpt")
    plain, module = load_plain_model(path), load_detector(path, "cpu").module
    assert plain.state_dict().keys() == module.state_dict().keys()
    assert plain.score_threshold == module.score_threshold
    assert not plain.training
