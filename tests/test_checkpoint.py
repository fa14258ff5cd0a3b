"""The published layout both ways, and starting weights of every kind."""

import argparse
import gzip
import json

import pytest
import torch

from dino_lightning.checkpoint import (
    CheckpointError,
    coco_names,
    from_published,
    load_weights,
    read_weights,
    to_published,
    to_published_key,
)
from dino_lightning.model import DINO
from dino_lightning.optim import parameter_groups
from tests.conftest import TINY_SIZES
from tests.golden_recipe import GOLDEN

SIZES = {
    "4scale": {},
    "5scale": {"feature_strides": [4, 8, 16, 32], "num_feature_levels": 5},
}


def manifest(scale):
    return json.loads(gzip.decompress((GOLDEN / f"state_dict_{scale}_r50.json.gz").read_bytes()))


@pytest.mark.parametrize("scale", SIZES)
def test_state_dict_is_the_published_one(scale):
    model = DINO(num_classes=91, **SIZES[scale])
    expected = manifest(scale)
    published = to_published(model.state_dict())
    assert set(published) == set(expected["entries"])
    assert len(published) == {"4scale": 626, "5scale": 630}[scale]
    for key, entry in expected["entries"].items():
        assert list(published[key].shape) == entry["shape"], key
        if entry.get("alias_of"):
            assert published[key] is published[entry["alias_of"]], key
    names = [to_published_key(name).format(layer=0) for name, _ in model.named_parameters()]
    assert names == expected["named_parameters_order"]
    assert sum(p.numel() for p in model.parameters()) == expected["num_parameters_unique"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected["num_trainable_at_build"]
    back = from_published(published)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("rule", "published_rule"),
    [("default", "default"), ("offsets", "ddetr_in_mmdet"), ("no_norm_decay", "large_wd")],
)
def test_parameter_groups_are_the_published_ones(rule, published_rule):
    expected = json.loads(gzip.decompress((GOLDEN / "param_groups_4scale_r50.json.gz").read_bytes()))[published_rule]
    model = DINO(num_classes=91)
    name_of = {id(p): to_published_key(name).format(layer=0) for name, p in model.named_parameters()}
    groups = parameter_groups(model, lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4, rule=rule)
    expected = [group for group in expected if group["names"]]
    assert [[name_of[id(p)] for p in group["params"]] for group in groups] == [group["names"] for group in expected]
    for group, other in zip(groups, expected, strict=True):
        rate = other["lr"] if isinstance(other["lr"], float) else float(other["lr"].split("(")[1].rstrip(")"))
        assert group["lr"] == pytest.approx(rate)
        decay = other["weight_decay"]
        assert group["weight_decay"] == (pytest.approx(1e-4) if isinstance(decay, str) else decay)


def tiny(num_classes, **changes):
    return DINO(num_classes=num_classes, **{**TINY_SIZES, "backbone_norm": "frozen", **changes})


@pytest.fixture
def published_file(tmp_path):
    """A checkpoint as the published code writes it: aliases, a Namespace inside, 91 classes."""
    torch.manual_seed(1)
    model = tiny(91)
    path = tmp_path / "checkpoint0011_4scale.pth"
    content = {"model": to_published(model.state_dict()), "args": argparse.Namespace(lr=1e-4), "epoch": 11}
    torch.save(content, path)
    return path, model


def test_published_file_loads_exactly(published_file):
    path, source = published_file
    model = tiny(91)
    line = load_weights(model, path)
    assert "91 of 91 classes kept" in line
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_coco_classes_are_matched_by_name(published_file):
    path, source = published_file
    names = ["Dog", "person", "floor lamp", "traffic-light"]
    model = tiny(len(names))
    before = model.state_dict()["decoder.class_head.weight"].clone()
    line = load_weights(model, path, names)
    assert "3 of 4 classes matched by name, 1 start afresh" in line
    coco = coco_names()
    for key in ("decoder.class_head.weight", "query_selection.class_head.bias", "label_embedding.weight"):
        ours, theirs = model.state_dict()[key], source.state_dict()[key]
        assert torch.equal(ours[0], theirs[coco.index("dog")])
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[3], theirs[10])
    assert torch.equal(model.state_dict()["decoder.class_head.weight"][2], before[2])


def test_a_class_unknown_to_the_file_starts_afresh(published_file):
    path, _ = published_file
    model = tiny(1)
    bias = model.decoder.class_head.bias.clone()
    assert "class heads start afresh (91 classes in the file, 1 here)" in load_weights(model, path, ["room"])
    assert torch.equal(model.decoder.class_head.bias, bias)


def test_prefix_of_data_parallel_and_single_aliases_are_accepted(tmp_path):
    model = tiny(2)
    published = to_published(model.state_dict())
    state = {
        f"module.{key}": value for key, value in published.items() if not key.startswith("transformer.decoder.class")
    }
    torch.save(state, tmp_path / "bare.pth")
    assert read_weights(tmp_path / "bare.pth").state.keys() == model.state_dict().keys()


def test_another_architecture_is_refused(published_file):
    path, _ = published_file
    with pytest.raises(CheckpointError, match="num_queries"):
        load_weights(tiny(91, num_queries=13), path)
    with pytest.raises(CheckpointError, match=r"another architecture: .*entries are missing"):
        load_weights(tiny(91, num_decoder_layers=3), path)


class Payload:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "code", "list", "other model", "missing"])
def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path, kind, capsys):
    path = tmp_path / "file.pth"
    if kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        torch.save({"model": {"a": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        torch.save({"model": Payload()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other model":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(tiny(1), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out
