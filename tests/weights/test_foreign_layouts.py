"""DINO weights of detrex and mmdetection: names, and the numbers that their own programs compute with them."""

import gzip
import json

import pytest
import torch

from dino_lightning.model import DINO
from dino_lightning.structures import Batch
from dino_lightning.weights.foreign_layouts import from_official, official_keys, to_official
from dino_lightning.weights.loading import load_weights
from dino_lightning.weights.published_layout import to_published
from tests.conftest import TINY_SIZES
from tests.golden_recipe import GOLDEN, TINY, golden_arrays, golden_json, recipe_image, recipe_tensor

MANIFESTS = {
    "detrex": "4scale_r50 5scale_r50 4scale_r101 4scale_swint 4scale_swinl 5scale_swinl 4scale_convnext_t tiny_r50",
    "mmdet": "4scale_r50 5scale_swinl tiny_r50",
}
MODELS = [(project, name) for project, names in MANIFESTS.items() for name in names.split()]
SIZES = [(160, 224), (192, 128)]


def manifest(project, name):
    with gzip.open(GOLDEN / f"state_dict_{project}_{name}.json.gz", "rt") as file:
        return json.load(file)["entries"]


@pytest.mark.parametrize(
    ("project", "name"), [(key, name) for key, names in MANIFESTS.items() for name in names.split()]
)
def test_every_name_of_their_state_dicts_is_known(project, name):
    entries = manifest(project, name)
    keys = official_keys(project, dict.fromkeys(entries))
    for key, entry in entries.items():
        if key.endswith("num_batches_tracked"):
            assert key not in keys
            continue
        assert keys[key].removeprefix("transformer.decoder.") == entry["official_key"].removeprefix(
            "transformer.decoder."
        )


@pytest.mark.parametrize(("project", "name"), MODELS)
def test_what_is_written_back_has_their_names_and_values(project, name):
    small = {}
    for index, (key, entry) in enumerate(manifest(project, name).items()):
        # Few rows and columns, as the names matter; but the shapes that tell what a layer is.
        shape = [min(size, 8) for size in entry["shape"]]
        counter = key.endswith("num_batches_tracked")
        small[key] = (
            torch.tensor(0) if counter else torch.arange(torch.Size(shape).numel()).view(shape) + 1000.0 * index
        )
    if project == "detrex":  # two names of one tensor
        for key in small:
            alias = key.removeprefix("transformer.decoder.")
            small[key] = small[alias] if alias in small else small[key]
    back = from_official(project, to_official(project, small))
    assert back.keys() == small.keys()
    assert all(torch.equal(back[key], small[key]) for key in small)


def test_patch_merging_of_mmdetection_sees_the_same_pixels():
    """Theirs unfolds patches channel by channel; the published one lays four smaller pictures together."""
    torch.manual_seed(0)
    channels, image = 5, torch.randn(1, 5, 6, 8)
    norm, reduction = torch.nn.LayerNorm(4 * channels), torch.nn.Linear(4 * channels, 3, bias=False)
    torch.nn.init.normal_(norm.weight)
    theirs = reduction(norm(torch.nn.functional.unfold(image, 2, stride=2).transpose(1, 2)))
    stem = "backbone.stages.0.downsample"
    state = {
        f"{stem}.norm.weight": norm.weight,
        f"{stem}.norm.bias": norm.bias,
        f"{stem}.reduction.weight": reduction.weight,
    }
    rest = {
        "decoder.layers.0.norms.0.weight": torch.zeros(1),
        "dn_query_generator.label_embedding.weight": torch.zeros(1, 2),
    }
    official = to_official("mmdet", state | rest)
    stem = "backbone.0.layers.0.downsample"
    pixels = image.permute(0, 2, 3, 1)
    merged = torch.cat([pixels[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1).flatten(1, 2)
    weights = official[f"{stem}.norm.weight"], official[f"{stem}.norm.bias"]
    ours = torch.nn.functional.layer_norm(merged, (4 * channels,), *weights) @ official[f"{stem}.reduction.weight"].T
    torch.testing.assert_close(ours, theirs)


def test_a_bias_that_mmdetection_has_no_place_for_is_refused():
    model = DINO(**{**TINY_SIZES, "num_classes": 2})
    torch.nn.init.ones_(model.neck.projections[0][0].bias)
    with pytest.raises(ValueError, match="have no bias"):
        from_official("mmdet", to_published(model.state_dict()))


def test_an_entry_that_nobody_knows_is_named():
    state = {"transformer.level_embeds": torch.zeros(1), "transformer.decoder.layers.0.new.weight": torch.zeros(1)}
    with pytest.raises(KeyError, match=r"new\.weight' is not an entry of detrex's DINO"):
        to_official("detrex", state)


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
