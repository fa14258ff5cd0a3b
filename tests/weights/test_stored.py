"""Checkpoints that hold what they must not: one sentence from every way to load them."""

import pytest
import torch

from dino_lightning import DINOModule, load_detector
from dino_lightning.__main__ import run
from dino_lightning.errors import CheckpointError
from dino_lightning.weights.reading import read_weights
from dino_lightning.weights.stored import check_hyperparameters, complete_settings, package_version
from tests.inference.test_detector import save_tiny


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return torch.load(save_tiny(tmp_path_factory.mktemp("model") / "best.ckpt"), weights_only=True)


@pytest.fixture
def changed(content, tmp_path):
    """Writes the checkpoint with other entries, hyperparameters or tensors."""

    def write(entries=(), settings=(), tensors=()):
        stored = {**content, **dict(entries)}
        stored["hyper_parameters"] = {**content["hyper_parameters"], **dict(settings)}
        stored["state_dict"] = {**content["state_dict"], **dict(tensors)}
        torch.save(stored, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return write


HEAD = "model.decoder.class_head.bias"
REFUSED = {
    "nan": ({"tensors": {HEAD: torch.tensor([0.0, float("nan")])}}, rf"1 of its \d+ tensors .* \(first: {HEAD}\)"),
    "misshapen": ({"tensors": {HEAD: torch.zeros(3)}}, rf"1 are of another shape or kind \(first: {HEAD}\)"),
    "extra": ({"tensors": {"model.more": torch.zeros(3)}}, r"1 are unknown .* \(first: model.more\)"),
    "newer format": ({"entries": {"dino_lightning_format": 2, "dino_lightning_version": "9.0"}}, "newer version .*9.0"),
    "new hyperparameter": (
        {"settings": {"rotated": 1}},
        r"does not know \('rotated'\); it is of another version, or of a subclass",
    ),
    "of another version": (
        {"settings": {"rotated": 1}, "entries": {"dino_lightning_version": "9.0"}},
        r"does not know \('rotated'\); it was written by version '9.0': install that one",
    ),
    "of this version": (
        {"settings": {"rotated": 1}, "entries": {"dino_lightning_version": package_version()}},
        r"does not know \('rotated'\); this version wrote it, so they are of a subclass of yours or of changed code",
    ),
    "wrong type": ({"settings": {"hidden_dim": "32"}}, "hyperparameter hidden_dim is '32'"),
    "out of range": ({"settings": {"max_detections": 0}}, "hyperparameter max_detections is 0"),
    "class names": ({"settings": {"class_names": ["room"]}}, "1 class_names for 2 classes"),
    "repeated ids": ({"settings": {"category_ids": [3, 3]}}, "category_ids repeat"),
    "impossible sizes": ({"settings": {"num_heads": 5}}, "make no model"),
    "threshold": ({"entries": {"score_threshold": float("nan")}}, "score_threshold is nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence_says_what_is_wrong(case, changed):
    changes, sentence = REFUSED[case]
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_detector(changed(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["nan", "newer format", "wrong type", "class names", "threshold"])
def test_starting_weights_are_checked_alike(case, changed):
    changes, sentence = REFUSED[case]
    with pytest.raises(CheckpointError, match=sentence if case != "class names" else "1 class_names|names 1 classes"):
        read_weights(changed(**changes))


def test_every_command_refuses_weights_that_are_not_finite(changed, rooms, tmp_path, capsys):
    file = str(changed(**REFUSED["nan"][0]))
    data = ["--data.root", str(rooms), "--run_dir", str(tmp_path / "run")]
    for args in (
        ["predict", "--ckpt_path", file, "--images", str(rooms / "val" / "images"), "--output", str(tmp_path / "out")],
        ["export", "--ckpt_path", file, "--output", str(tmp_path / "model.onnx")],
        ["convert", "--weights", file, "--output", str(tmp_path / "published.pth")],
        ["validate", "--ckpt_path", file, *data],
        ["validate", "--model.weights", file, *data],
        ["fit", "--ckpt_path", file, *data],
    ):
        assert run(args) == 1, args
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1 and f"first: {HEAD.removeprefix('model.')}" in errors[0].replace("model.dec", "dec")


def test_what_a_checkpoint_of_this_version_lacks_is_said(content, changed, capsys):
    whole = complete_settings(load_detector(changed()).module.hparams)
    stamped = {"dino_lightning_format": 1}
    load_detector(changed(entries=stamped, settings=whole))
    assert capsys.readouterr().err == ""
    load_detector(changed(entries=stamped, settings={**whole, "image_size": None}))
    assert "lacks the hyperparameters image_size; their defaults are used" in capsys.readouterr().err
    load_detector(changed())  # of an older version, which stored only what was given
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("threshold", [float("nan"), 7.0, -0.1, True])
def test_a_threshold_lies_between_0_and_1(threshold, changed, rooms):
    detector = load_detector(changed())
    for detect in (detector.detect, detector.module.detect):
        with pytest.raises(ValueError, match="must be a number between 0 and 1"):
            detect([rooms / "val" / "images" / "000001.png"], threshold=threshold)


class _Own(DINOModule):
    """As users write it: an argument more, the others handed on."""

    def __init__(self, margin: float = 0.5, **others) -> None:
        super().__init__(**others)


def test_a_subclass_has_hyperparameters_of_its_own(content):
    settings = {**content["hyper_parameters"], "margin": 1, "lr": 1e-3}
    check_hyperparameters({"hyper_parameters": settings}, "own.ckpt", _Own)
    with pytest.raises(CheckpointError, match=r"own.ckpt has hyperparameters .*'margin'"):
        check_hyperparameters({"hyper_parameters": settings}, "own.ckpt", DINOModule)
    with pytest.raises(CheckpointError, match="margin is 'wide'"):
        check_hyperparameters({"hyper_parameters": {**settings, "margin": "wide"}}, "own.ckpt", _Own)
