"""Backbones of many families: strides, channels, freezing, torchvision weights by name."""

import copy

import pytest
import torch
import torchvision

from dino_lightning.model.backbone import Backbone, pretrained_state

FAMILIES = [
    "resnet10",
    "resnet18",
    "resnet34",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "convnext_tiny",
    "swin_t",
    "efficientnet_b0",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_have_the_strides_asked_for(name):
    backbone = Backbone(name=name, strides=(4, 8, 16, 32), norm="group", trainable_layers=5).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(feature.shape[2:]) for feature in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert tuple(feature.shape[1] for feature in maps) == backbone.channels


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext_tiny", "swin_t"])
def test_sizes_that_are_no_multiple_of_the_stride(name):
    maps = Backbone(name=name, norm="group").eval()(torch.rand(1, 3, 75, 50))
    assert all(torch.isfinite(feature).all() for feature in maps)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_loaded_weights_give_torchvision_features(name):
    """With frozen norms the maps equal those of the torchvision network in evaluation mode."""
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name, weights=None)
    for module in reference.modules():  # statistics as after training, not the trivial start
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    reference.eval()
    backbone = Backbone(name=name, strides=(32,))
    trunk_state = {f"body.{key}": value for key, value in reference.state_dict().items()}
    backbone.load_state_dict({key: trunk_state[key] for key in backbone.state_dict()})
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        if name == "resnet18":
            trunk = torch.nn.Sequential(*list(reference.children())[:-2])
            expected = trunk(image)
        else:
            expected = reference.features(image)
        torch.testing.assert_close(backbone.train()(image)[0], expected, atol=1e-4, rtol=1e-4)


def test_published_freezing_of_resnet():
    backbone = Backbone(name="resnet18")
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    nothing = Backbone(name="resnet18", trainable_layers=0)
    assert not any(p.requires_grad for p in nothing.parameters())
    everything = Backbone(name="resnet18", trainable_layers=5, norm="group")
    assert all(p.requires_grad for p in everything.parameters())


def test_unneeded_stages_are_dropped():
    names = {name.split(".")[1] for name, _ in Backbone(name="resnet18", strides=(8, 16)).named_parameters()}
    assert "layer4" not in names


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b"])
def test_published_swins_by_torchvisions_names_take_its_weights(name):
    with torch.device("meta"):
        ours = Backbone(name=name, strides=(4, 8, 16, 32)).body.state_dict()
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
    theirs = {key: value for key, value in theirs.items() if key.startswith("features.")}
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize(("name", "like", "window"), [("swin_b_384", "swin_b", 12), ("swin_l_224", "swin_l", 7)])
def test_published_swins_of_another_window(name, like, window):
    with torch.device("meta"):
        own, other = (Backbone(name=one, strides=(4, 8, 16, 32)).state_dict() for one in (name, like))
    assert own.keys() == other.keys()
    for key, value in own.items():
        if "relative_position" not in key:
            assert value.shape == other[key].shape, key
        elif key.endswith("bias_table"):
            assert value.shape == ((2 * window - 1) ** 2, other[key].shape[1])


def test_weights_that_torchvision_has_not_are_refused():
    with pytest.raises(ValueError, match="no torchvision weights 'IMAGENET9K'"):
        pretrained_state("resnet18", "IMAGENET9K")
    with pytest.raises(ValueError, match="swin_l has no torchvision weights"):
        pretrained_state("swin_l", "IMAGENET1K_V1")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_frozen_norms_are_folded_without_a_trace_in_names_gradients_and_copies(name):
    """Beside the same network with torchvision's frozen norms carried out one by one."""
    torch.manual_seed(0)
    backbone = Backbone(name=name, trainable_layers=5)
    for key, value in backbone.state_dict().items():
        if key.endswith("running_var"):
            torch.nn.init.uniform_(value, 0.5, 2.0)
        elif key.endswith(("running_mean", "bias")):
            torch.nn.init.uniform_(value, -0.2, 0.2)
    plain = torchvision.models.get_model(name, weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    missing, unexpected = plain.load_state_dict(backbone.body.state_dict(), strict=False)
    assert unexpected == [] and all(key.startswith(("fc.", "classifier.", "features.18.")) for key in missing)
    copied = copy.deepcopy(backbone)
    image = torch.rand(1, 3, 64, 64)
    trunk = getattr(plain, "features", None)
    steps = list(plain.children())[:-2] if trunk is None else list(trunk)[: len(backbone.body.features)]
    reference = torch.nn.Sequential(*steps)(image)
    reference.square().sum().backward()
    for network in (backbone, copied):
        found = network(image)[-1]
        torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)
        found.square().sum().backward()
        expected = dict(plain.named_parameters())
        for key, parameter in network.body.named_parameters():
            scale = expected[key].grad.abs().max()
            torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-3, atol=float(1e-4 * scale), msg=key)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert next(backbone.parameters()).abs().sum() > 0
