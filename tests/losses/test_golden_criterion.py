"""Matching and losses against the published numbers, gradients included."""

import pytest
import torch

from dino_lightning.losses import Criterion, HungarianMatcher
from dino_lightning.structures import DenoisingOutput, ModelOutput, pad_targets
from tests.golden_recipe import golden_arrays, golden_json

CASES = golden_json("criterion_losses.json")["cases"]
TERMS = {"loss_class": "loss_ce", "loss_bbox": "loss_bbox", "loss_giou": "loss_giou"}


def published_name(name):
    """Our loss name -> the published one: `loss_class_denoising_0` -> `loss_ce_dn_0`."""
    for ours, theirs in TERMS.items():
        name = name.replace(ours, theirs)
    return name.replace("_denoising", "_dn").replace("_encoder", "_interm")


def layers(part, names, what):
    return [part[f"{name}/{what}"].requires_grad_() for name in names]


@pytest.mark.parametrize("case", CASES)
def test_losses_matches_and_gradients(case):
    meta = CASES[case]
    part = {key.removeprefix(f"{case}/"): value for key, value in golden_arrays("criterion.npz").items()}
    counts = meta["box_counts"]
    targets = pad_targets([(part[f"target{i}/boxes"], part[f"target{i}/labels"]) for i in range(len(counts))])
    order = ["aux0", "aux1", "final"]
    leaves = {what: layers(part, [*order, "interm"], what) for what in ("pred_logits", "pred_boxes")}
    denoising = None
    has_denoising = f"{case}/dn/pred_logits" in golden_arrays("criterion.npz") and meta["pad_size"]
    if has_denoising:
        dn = {what: layers(part, ["dn_aux0", "dn_aux1", "dn"], what) for what in ("pred_logits", "pred_boxes")}
        denoising = DenoisingOutput(
            pred_logits=torch.stack(dn["pred_logits"]),
            pred_boxes=torch.stack(dn["pred_boxes"]),
            num_groups=meta["dn_groups"],
            max_boxes=max(counts),
        )
    output = ModelOutput(
        pred_logits=torch.stack(leaves["pred_logits"][:3]),
        pred_boxes=torch.stack(leaves["pred_boxes"][:3]),
        encoder_logits=leaves["pred_logits"][3],
        encoder_boxes=leaves["pred_boxes"][3],
        denoising=denoising,
    )
    losses = Criterion()(output, targets)

    assert losses["loss"].item() == pytest.approx(meta["total_weighted"], rel=1e-5)
    for name, value in losses.items():
        if name != "loss":
            assert value.item() == pytest.approx(meta["losses"][published_name(name)], rel=1e-5, abs=1e-6), name
    expected = {name for name in meta["losses"] if name.startswith(tuple(TERMS.values()))}
    unnamed = expected - {published_name(name) for name in losses}
    assert all("_dn" in name and meta["losses"][name] == 0 for name in unnamed)

    matches = HungarianMatcher()(torch.stack(leaves["pred_logits"]), torch.stack(leaves["pred_boxes"]), targets)
    for layer, name in enumerate([*order, "interm"]):
        for image in range(len(counts)):
            boxes = matches.matched[layer, image].nonzero().flatten()
            found = set(zip(matches.queries[layer, image, boxes].tolist(), boxes.tolist(), strict=True))
            prefix = f"match_{name}/{image}"
            assert found == set(zip(part[f"{prefix}/src"].tolist(), part[f"{prefix}/tgt"].tolist(), strict=True))

    losses["loss"].backward()
    pairs = {(name, what): leaves[what][i] for i, name in enumerate([*order, "interm"]) for what in leaves}
    if has_denoising:
        pairs |= {(name, what): dn[what][i] for i, name in enumerate(["dn_aux0", "dn_aux1", "dn"]) for what in dn}
    for (name, what), leaf in pairs.items():
        torch.testing.assert_close(leaf.grad, part[f"{name}/grad_{what}"], atol=1e-5, rtol=1e-4)


def test_cost_matrix():
    part = {k.removeprefix("cost/"): v for k, v in golden_arrays("criterion.npz").items() if k.startswith("cost/")}
    targets = pad_targets([(part["boxes"], part["labels"])])
    matcher = HungarianMatcher()
    cost = matcher.cost(part["pred_logits"][None], part["pred_boxes"][None], targets)
    torch.testing.assert_close(cost[0, 0].T, part["matrix"], atol=1e-5, rtol=1e-5)
