"""The whole detector against the published numbers (tolerances: CPU float32)."""

import pytest
import torch

from dino_lightning.model import DINO
from dino_lightning.structures import Batch
from tests.golden_recipe import TINY, golden_arrays, golden_json, load_recipe, recipe_image, recipe_tensor


def test_recipe_repeats_the_published_weights():
    for entry in golden_json("recipe_check.json")["keys"].values():
        salt, key = entry["seed_string"].removeprefix("dino-golden:").split(":", 1)
        if key.endswith(".gamma") or "relative_position" in key:
            continue  # backbones that are not built here
        tensor = recipe_tensor(key, tuple(entry["shape"]), int(salt))
        assert tensor.flatten()[:4].tolist() == pytest.approx(entry["first4"][: tensor.numel()], rel=1e-6)
        assert tensor.double().sum().item() == pytest.approx(entry["sum_float64"], rel=1e-5, abs=1e-3)


@pytest.mark.parametrize(
    ("case", "sizes", "overrides"),
    [
        ("tiny4", [(160, 224), (192, 128)], TINY),
        ("full4", [(320, 352), (256, 384)], {"num_classes": 91}),
    ],
)
def test_forward_matches_published(case, sizes, overrides):
    golden, meta = golden_arrays(f"forward_{case}.npz"), golden_json(f"forward_{case}_meta.json")
    model = load_recipe(DINO(**overrides), meta["salts"]).eval()
    seen = {}
    model.query_selection.register_forward_hook(lambda module, args, out: seen.update(memory=args[0], selected=out))
    with torch.no_grad():
        output = model(Batch.from_images([recipe_image(case, *size) for size in sizes]))

    stride = int(golden["memory_token_stride"]) if "memory_token_stride" in golden else 1
    assert torch.equal(seen["selected"].token_indices, golden["topk_indices"])
    torch.testing.assert_close(seen["memory"][:, ::stride], golden["memory_sub"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.encoder_boxes, golden["interm_pred_boxes"], atol=2e-5, rtol=0)
    torch.testing.assert_close(output.pred_logits[-1], golden["pred_logits"], atol=2e-4, rtol=0)
    torch.testing.assert_close(output.pred_boxes[-1], golden["pred_boxes"], atol=2e-5, rtol=0)
    sub = golden["sub_query_index"] if "sub_query_index" in golden else slice(None)
    torch.testing.assert_close(output.encoder_logits[:, sub], golden["interm_pred_logits_sub"], atol=2e-4, rtol=0)
    for layer in range(len(output.pred_boxes) - 1):
        torch.testing.assert_close(output.pred_boxes[layer], golden[f"aux{layer}_pred_boxes"], atol=2e-5, rtol=0)
        if f"aux{layer}_pred_logits_sub" in golden:
            expected = golden[f"aux{layer}_pred_logits_sub"]
            torch.testing.assert_close(output.pred_logits[layer][:, sub], expected, atol=2e-4, rtol=0)


def test_backbone_features_match_published():
    meta = golden_json("forward_tiny4_meta.json")
    model = load_recipe(DINO(**TINY), meta["salts"]).eval()
    batch = Batch.from_images([recipe_image("tiny4", *size) for size in [(160, 224), (192, 128)]])
    with torch.no_grad():
        features = model.backbone(batch.images)
    for feature, expected in zip(features, meta["backbone_feature_stats"].values(), strict=True):
        f = feature.double()
        assert list(f.shape) == expected["shape"]
        stats = [f.mean(), f.std(), f.min(), f.max(), f.abs().mean()]
        assert [value.item() for value in stats] == pytest.approx(expected["stats"], rel=1e-4, abs=1e-5)
