"""What a training run costs by its configuration, before anything is uploaded."""

import pytest

from dino_lightning import DINOModule
from sagemaker_entry.laptop.fit_checks import counted_operations
from sagemaker_entry.laptop.model_size import PUBLISHED_CONSTANT, PUBLISHED_PER_PIXEL
from sagemaker_entry.laptop.training_config import check_training

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v2", "convnext_tiny")]


@pytest.mark.parametrize("backbone", [*SLOW, "swin_t", "timm/test_convnext"])
def test_every_kind_of_backbone_can_be_planned(backbone, rooms):
    """Some read values while they are built, which tensors without values do not have."""
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    own = [f"--model.backbone={backbone}", "--model.backbone_weights=pretrained", "--model.weights_for_rooms=null"]
    training = check_training("small_cpu.yaml", str(rooms), [*own, "--data.num_workers=0"])
    assert training.teraflops > 0 and training.parameters > 1_000_000
    assert (training.backbone, training.start) == (backbone, "of the backbone alone: pretrained")


def test_weights_for_rooms_are_named_and_go_along(rooms, tmp_path):
    """They count where a class is a room; a file of this machine is uploaded like other weights."""
    training = check_training("small_cpu.yaml", str(rooms), ["--data.num_workers=0"])
    assert (training.start, training.weights) == ("rooms_small, in the package", {})
    file = tmp_path / "mine.ckpt"
    file.write_bytes(b"not read on the laptop")
    own = [f"--model.weights_for_rooms={file}", "--data.num_workers=0"]
    training = check_training("small_cpu.yaml", str(rooms), own)
    assert training.weights == {"model.weights_for_rooms": file}
    assert training.start == f"{file}, uploaded once"
    assert training.arguments == ("--data.num_workers=0",)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(480, 640), (800, 1067), (800, 1333)])
def test_the_table_has_the_operations_of_the_published_model(height, width):
    counted = counted_operations(DINOModule(num_classes=2, backbone_weights=None), height, width)
    assert PUBLISHED_CONSTANT + PUBLISHED_PER_PIXEL * height * width == pytest.approx(counted, rel=0.01)


def test_another_architecture_is_counted(rooms):
    published = check_training("room_detection.yaml", str(rooms), [])
    other = check_training("room_detection.yaml", str(rooms), ["--model.num_encoder_layers=3", "--model.weights=null"])
    height, width = published.image_size
    assert published.teraflops == PUBLISHED_CONSTANT + PUBLISHED_PER_PIXEL * height * width
    assert 0 < other.teraflops < published.teraflops and other.parameters < published.parameters
