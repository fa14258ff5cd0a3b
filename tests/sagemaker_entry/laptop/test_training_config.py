"""What a training run costs by its configuration, before anything is uploaded."""

import pytest

from sagemaker_entry.laptop.training_config import check_training


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "convnext_tiny", "swin_t", "timm/test_convnext"])
def test_every_kind_of_backbone_can_be_planned(backbone, rooms):
    """Some read values while they are built, which tensors without values do not have."""
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    own = [f"--model.backbone={backbone}", "--model.backbone_weights=pretrained", "--model.weights_for_rooms=null"]
    training = check_training("small_cpu.yaml", str(rooms), [*own, "--data.num_workers=0"])
    assert training.teraflops > 0 and training.parameters > 1_000_000
    assert (training.backbone, training.start) == (backbone, "of the backbone alone: pretrained")
