"""DINO weights of detrex and mmdetection: names, and the numbers that their own programs compute with them."""

import gzip
import json

import pytest
import torch

from dino_lightning.model import DINO
from dino_lightning.structures import Batch
from dino_lightning.weights.foreign_layouts import official_keys
from dino_lightning.weights.loading import load_weights
from tests.golden_recipe import GOLDEN, TINY, golden_arrays, golden_json, recipe_image, recipe_tensor

MANIFESTS = {
    "detrex": ["4scale_r50", "5scale_r50", "4scale_r101", "4scale_swint", "4scale_swinl", "5scale_swinl"]
    + ["4scale_convnext_t", "tiny_r50"],
    "mmdet": ["4scale_r50", "5scale_swinl", "tiny_r50"],
}
SIZES = [(160, 224), (192, 128)]


def manifest(project, name):
    with gzip.open(GOLDEN / f"state_dict_{project}_{name}.json.gz", "rt") as file:
        return json.load(file)["entries"]


@pytest.mark.parametrize(("project", "name"), [(key, name) for key, names in MANIFESTS.items() for name in names])
def test_every_name_of_their_state_dicts_is_known(project, name):
    entries = manifest(project, name)
    keys = official_keys({"detrex": "detrex", "mmdet": "mmdetection"}[project], dict.fromkeys(entries))
    for key, entry in entries.items():
        if key.endswith("num_batches_tracked"):
            assert key not in keys
            continue
        assert keys[key].removeprefix("transformer.decoder.") == entry["official_key"].removeprefix(
            "transformer.decoder."
        )


def golden_state(project, salts, *, scaled=()):
    """The weights of a golden case, under the project's own names."""
    state = {}
    for key, entry in manifest(project, "tiny_r50").items():
        seed = entry.get("seed_key_per_layer")
        shape = tuple(entry["shape"])
        state[key] = (
            torch.zeros(shape, dtype=torch.int64) if seed is None else recipe_tensor(seed, shape, salts.get(seed, 0))
        )
        if seed in scaled:
            state[key] = state[key] * 12
    return state


def write(project, state, path):
    torch.save(
        {"model" if project == "detrex" else "state_dict": state},
        path,
        _use_new_zipfile_serialization=project == "detrex",
    )
    return path


def golden_model(project, variant, path, **scaled):
    meta = golden_json(f"forward_{project}_tiny4_meta.json")["variants"][variant]
    state = golden_state(project, meta["salts"], **scaled)
    model = DINO(
        **TINY,
        shared_heads=False,
        position_temperature=meta["position_temperature"],
        position_offset=meta["position_offset"],
        box_epsilon=1e-5 if project == "mmdet" else 1e-3,
    )
    load_weights(model, write(project, state, path))
    return model.eval()


CASES = [("detrex", "main"), ("detrex", "t20"), ("mmdet", "main"), ("mmdet", "improved")]


@pytest.mark.parametrize(("project", "variant"), CASES)
def test_a_file_of_theirs_gives_their_numbers(project, variant, tmp_path):
    golden = golden_arrays(f"forward_{project}_tiny4.npz")
    prefix = "" if variant == "main" else f"{variant}_"
    model = golden_model(project, variant, tmp_path / "theirs.pth")
    seen = {}
    model.query_selection.register_forward_hook(lambda module, args, out: seen.update(memory=args[0], selected=out))
    with torch.no_grad():
        output = model(Batch.from_images([recipe_image("tiny4", *size) for size in SIZES]))
    assert torch.equal(seen["selected"].token_indices, golden[f"{prefix}topk_indices"])
    torch.testing.assert_close(seen["memory"][:, ::8], golden[f"{prefix}memory_sub"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.encoder_boxes, golden[f"{prefix}interm_pred_boxes"], atol=2e-5, rtol=0)
    torch.testing.assert_close(output.encoder_logits, golden[f"{prefix}interm_pred_logits"], atol=2e-4, rtol=0)
    for layer in range(2):
        torch.testing.assert_close(
            output.pred_logits[layer], golden[f"{prefix}layer{layer}_pred_logits"], atol=2e-4, rtol=0
        )
        torch.testing.assert_close(
            output.pred_boxes[layer], golden[f"{prefix}layer{layer}_pred_boxes"], atol=2e-5, rtol=0
        )


def test_mmdetections_clamp_of_reported_boxes_shows_where_references_lie_at_the_edge(tmp_path):
    golden = golden_arrays("forward_mmdet_tiny4.npz")
    scaled = ("transformer.enc_out_bbox_embed.layers.2.weight",)
    model = golden_model("mmdet", "main", tmp_path / "theirs.pth", scaled=scaled)
    batch = Batch.from_images([recipe_image("tiny4", *size) for size in SIZES])
    with torch.no_grad():
        boxes = model(batch).pred_boxes
        model.decoder.box_epsilon = 1e-3
        others = model(batch).pred_boxes
    expected = torch.stack([golden[f"edge_layer{layer}_pred_boxes"] for layer in range(2)])
    torch.testing.assert_close(boxes, expected, atol=2e-5, rtol=0)
    assert float((others - expected).abs().max()) > 1e-4
