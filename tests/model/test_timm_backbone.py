"""Backbones of the library timm: the same numbers, maps of any image, frozen stages, rates by stage, named weights."""

import re
import sys

import pytest
import torch
import torchvision
from torch import nn

from dino_lightning.__main__ import run
from dino_lightning.errors import CheckpointError
from dino_lightning.export.package_code import requirements, serving_code
from dino_lightning.model import DINO
from dino_lightning.model.backbone import Backbone
from dino_lightning.model.timm_backbone import TimmBackbone
from dino_lightning.training.optim import parameter_groups
from dino_lightning.weights.backbone_loading import start_backbone_from
from tests.conftest import TINY_ARGS, TINY_SIZES

timm = pytest.importorskip("timm")

TINY = "timm/test_resnet.r160_in1k"
SIZES = {**TINY_SIZES, "backbone": TINY}
FAMILIES = [
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_nfnet",
    "swin_tiny_patch4_window7_224",
    "mobilenetv4_conv_small",
    "test_mambaout",  # channels last
    "sam2_hiera_tiny",  # wrapped, not cut
]


def with_statistics(network):
    """Norms as after training, not at their trivial start."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def test_the_maps_are_those_of_the_same_network_in_torchvision():
    torch.manual_seed(0)
    state = with_statistics(torchvision.models.resnet18(weights=None)).state_dict()
    ours, theirs = Backbone(name="resnet18"), TimmBackbone(name="timm/resnet18")
    for backbone in (ours, theirs):
        backbone.load_state_dict({key: state[key.removeprefix("body.")] for key in backbone.state_dict()})
    images = torch.randn(2, 3, 96, 128)
    for first, second in zip(ours(images), theirs(images), strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    trained = [[n for n, p in backbone.named_parameters() if p.requires_grad] for backbone in (ours, theirs)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("name", "norm"),
    [*((name, "frozen") for name in FAMILIES), *((name, norm) for name in FAMILIES[:2] for norm in ("group", "batch"))],
)
def test_maps_of_any_image(name, norm):
    backbone = TimmBackbone(name=f"timm/{name}", norm=norm, strides=(4, 8, 16, 32), trainable_layers=2)
    maps = backbone(torch.randn(2, 3, 75, 130))
    assert [tuple(found.shape[2:]) for found in maps] == [(19, 33), (10, 17), (5, 9), (3, 5)]
    assert tuple(found.shape[1] for found in maps) == backbone.channels
    sum(found.square().mean() for found in maps).backward()
    for key, parameter in backbone.named_parameters():
        stays = backbone.stages[key] < 3 and key.startswith("body.")
        assert (parameter.grad is None) == stays, key
    assert {backbone.stages[key] for key, _ in backbone.named_parameters()} >= {1, 2, 3, 4}
    kinds = {type(module).__name__ for module in backbone.modules()}
    assert norm == "batch" or not any(kind.startswith("BatchNorm") for kind in kinds)


def test_group_norms_keep_the_activations_of_timms_norms():
    before = timm.create_model("test_efficientnet", features_only=True)
    after = TimmBackbone(name="timm/test_efficientnet", norm="group", trainable_layers=5).body
    for module, other in zip(before.modules(), after.modules(), strict=True):
        if isinstance(module, timm.layers.BatchNormAct2d):
            assert type(other) is timm.layers.GroupNormAct
            assert type(other.act) is type(module.act)


def test_weights_get_images_normalised_as_they_were_trained():
    backbone = TimmBackbone(name="timm/resnetv2_50", norm="batch").eval()  # of mean and deviation 0.5
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        found = backbone((pixels - mean[:, None, None]) / std[:, None, None])
        expected = backbone.body((pixels - 0.5) / 0.5)
    for first, second in zip(found, expected, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "timm/resnet_50"}, "timm .* has no such network. Did you mean timm/resnet50 "),
        ({"name": "timm/resnet50.bad"}, "cannot be built by timm .*bad"),
        ({"name": "timm/test_vit"}, r"must be ascending strides that timm/test_vit has: \[16\]"),
        ({"name": "timm/test_maxvit"}, "takes images of one size only"),
        ({"name": "timm/inception_v4"}, "has no map of stride 8 for images of any size"),
        ({"name": "timm/hrnet_w18_small"}, "does not tell the stages of timm/hrnet_w18_small apart; set it to 5 or 0"),
        ({"name": TINY, "trainable_layers": 6}, "not between 0 and 5"),
        ({"name": TINY, "strides": (16, 8)}, "must be ascending strides"),
    ],
)
def test_what_it_cannot_be_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TimmBackbone(**options)


def test_parts_that_reach_no_map_do_not_train():
    backbone = TimmBackbone(name="timm/hrnet_w18_small", trainable_layers=5)
    assert not all(parameter.requires_grad for parameter in backbone.parameters())
    sum(found.sum() for found in backbone(torch.randn(1, 3, 64, 64))).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in backbone.parameters())


def test_without_timm_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs the package timm: pip install 'dino-lightning\[timm\]'"):
        TimmBackbone(name=TINY)


def test_each_stage_has_its_rate():
    model = DINO(num_classes=1, **SIZES)
    groups = parameter_groups(model, lr=1.0, backbone_lr=1.0, weight_decay=0.0, backbone_layer_decay=0.5)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    found = {key: rates[id(parameter)] for key, parameter in model.backbone.body.named_parameters()}
    assert len(rates) == len(list(model.parameters()))
    for part, rate in {"conv1": 1 / 16, "layer1": 1 / 8, "layer2": 1 / 4, "layer3": 1 / 2, "layer4": 1}.items():
        assert {value for key, value in found.items() if key.startswith(part)} == {rate}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return with_statistics(timm.create_model(TINY.removeprefix("timm/")))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_of_timms_weights_is_loaded(network, kind, tmp_path):
    file = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(network.state_dict(), file)
    else:
        pytest.importorskip("safetensors.torch").save_file(network.state_dict(), file)
    model = DINO(num_classes=1, **SIZES)
    assert " loaded" in start_backbone_from(model, str(file)).line()
    for key, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


def test_a_flattened_network_and_another_ones_file(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("test_convnext")
    torch.save(whole.state_dict(), tmp_path / "convnext.pth")
    model = DINO(num_classes=1, **{**SIZES, "backbone": "timm/test_convnext"})
    start_backbone_from(model, str(tmp_path / "convnext.pth"))
    assert torch.equal(model.backbone.body.stem_0.weight, whole.stem[0].weight)
    assert torch.equal(model.backbone.body.stages_3.blocks[0].mlp.fc1.weight, whole.stages[3].blocks[0].mlp.fc1.weight)
    other = DINO(num_classes=1, **SIZES)
    with pytest.raises(CheckpointError, match=r"The weights of timm/test_resnet.r160_in1k in .* cannot be used"):
        start_backbone_from(other, str(tmp_path / "convnext.pth"))


def test_names_of_torchvisions_weights_are_refused():
    model = DINO(num_classes=1, **SIZES)
    with pytest.raises(CheckpointError, match="set backbone_weights to pretrained, to null or to a file"):
        start_backbone_from(model, "IMAGENET1K_V1")


@pytest.mark.parametrize("onnx", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_starts_by_name_and_is_evaluated_and_exported(
    onnx, network, rooms, tmp_path, monkeypatch, caplog, capsys
):
    """As a user runs it; the hub's cache has the weights, so that nothing is fetched."""
    constants = pytest.importorskip("huggingface_hub.constants")
    save_file = pytest.importorskip("safetensors.torch").save_file
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    save_file(network.state_dict(), repository / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sizes = [argument for argument in TINY_ARGS if "backbone" not in argument]
    own = ["--model.backbone", TINY, "--model.backbone_weights=pretrained", "--trainer.max_epochs=1"]
    run_dir = tmp_path / "run"
    assert run(["fit", "--data.root", str(rooms), "--run_dir", str(run_dir), *own, *sizes]) == 0
    assert re.search(r"pretrained for timm/test_resnet.r160_in1k, a timm backbone: 75 loaded", caplog.text)
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(state["model.backbone.body.conv1.0.weight"], network.state_dict()["conv1.0.weight"])  # frozen
    assert run(["validate", "--ckpt_path", str(checkpoint), "--data.root", str(rooms)]) == 0
    exported = ["export", "--ckpt_path", str(checkpoint), "--output"]
    if onnx:
        assert run([*exported, str(tmp_path / "model.onnx")]) == 0
        return
    assert run([*exported, str(tmp_path / "model"), "--format", "directory"]) == 0
    assert "timm>=1.0" in (tmp_path / "model" / "code" / "requirements.txt").read_text().split()


def test_weights_that_are_nowhere_are_said_to_be(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = DINO(num_classes=1, **SIZES)
    with pytest.raises(CheckpointError, match=r"Fetching the weights of timm/test_resnet.r160_in1k failed \(.+\)"):
        start_backbone_from(model, "pretrained")


def test_jobs_and_served_models_of_other_backbones_do_not_install_timm():
    assert not any(line.startswith("timm") for line in requirements("resnet50"))
    assert b"timm" not in serving_code("resnet50")["requirements.txt"]
    assert any(line.startswith("timm>=") for line in requirements(TINY))
