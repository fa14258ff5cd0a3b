"""One whole training step of the tiny model against the published numbers: losses, gradients, the updated weights."""

from dataclasses import replace

import pytest
import torch

from dino_lightning.losses import Criterion
from dino_lightning.model import DINO
from dino_lightning.structures import Batch
from dino_lightning.training.optim import parameter_groups
from dino_lightning.weights.published_layout import to_published_key
from tests.golden_recipe import TINY, golden_arrays, golden_json, load_recipe, recipe_image
from tests.losses.test_golden_criterion import published_name
from tests.model.test_golden_parts import flat_draws_to_noise


@pytest.mark.parametrize(
    "option",
    [
        "plain",
        pytest.param("compiled", marks=pytest.mark.slow),
        "recomputed",
        "channels last",
        "padded denoising queries",
    ],
)
def test_training_step(option):
    """Whatever is switched on for speed or memory, the numbers are the published ones."""
    golden, meta = golden_arrays("train_step.npz"), golden_json("train_step.json")
    options = {"recomputed": {"recompute_encoder": True}, "padded denoising queries": {"denoising_multiple": 100}}
    model = load_recipe(
        DINO(**TINY, num_denoising=12, denoising_rule="published", **options.get(option, {})), meta["salts"]
    ).train()
    if option == "compiled":
        model.compile_layers("aot_eager")
    counts = meta["box_counts"]
    batch = Batch.from_images(
        [recipe_image("step", *size) for size in meta["image_sizes"]],
        targets=[(golden[f"target{i}/boxes"], golden[f"target{i}/labels"]) for i in range(len(counts))],
    )
    if option == "channels last":
        batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
    noise = flat_draws_to_noise(golden, counts, meta["num_dn_group"], 0.5)
    groups = parameter_groups(model, lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(groups, fused=True)
    criterion = Criterion()

    output = model(batch, noise)
    torch.testing.assert_close(output.pred_logits[-1], golden["pred_logits"], atol=2e-4, rtol=0)
    torch.testing.assert_close(output.pred_boxes[-1], golden["pred_boxes"], atol=2e-5, rtol=0)
    torch.testing.assert_close(output.denoising.pred_logits[-1], golden["dn_pred_logits"], atol=2e-4, rtol=0)
    torch.testing.assert_close(output.denoising.pred_boxes[-1], golden["dn_pred_boxes"], atol=2e-5, rtol=0)
    torch.testing.assert_close(output.encoder_boxes, golden["interm_pred_boxes"], atol=2e-5, rtol=0)
    losses = criterion(output, batch.targets)
    assert losses["loss"].item() == pytest.approx(meta["total_weighted"], rel=1e-5)
    for name, value in losses.items():
        if name != "loss":
            assert value.item() == pytest.approx(meta["losses"][published_name(name)], rel=1e-4), name

    losses["loss"].backward()
    published = {name: meta["params"][to_published_key(name).format(layer=0)] for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == published[name]["requires_grad"], name
        if parameter.requires_grad:
            assert parameter.grad.double().norm().item() == pytest.approx(published[name]["grad_norm"], rel=1e-3), name
            first = parameter.grad.flatten()[:4]
            torch.testing.assert_close(
                first, torch.tensor(published[name]["grad_first4"][: len(first)]), rtol=2e-3, atol=1e-3
            )
    assert sum(parameter.grad is None for parameter in model.parameters()) == 11
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert total.item() == pytest.approx(meta["total_grad_norm_before_clip"], rel=1e-3)

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            delta = (parameter.detach() - before[name]).double().norm().item()
            assert parameter.detach().double().norm().item() == pytest.approx(
                published[name]["norm_after"], rel=1e-5
            ), name
            assert delta == pytest.approx(published[name]["delta_norm"], rel=1e-2), name
    after = criterion(model(batch, noise), batch.targets)
    published_after = meta["after_step_same_draws"]
    for term in ("loss_class_encoder", "loss_bbox_encoder", "loss_giou_encoder"):
        assert after[term].item() == pytest.approx(published_after["losses"][published_name(term)], rel=1e-3), term
    # Two proposals of nearly equal score swap ranks when sums are rounded in another order (seen with 2 threads, not
    # with 1), which moves the total by 0.7 %: content queries are tied to ranks.
    assert after["loss"].item() == pytest.approx(published_after["total_weighted"], rel=1e-2)


@pytest.mark.slow
def test_bfloat16_stays_close_to_the_published_step():
    """Losses of the proposals to 0.5 %, the total to 1 %, with the proposals that float32 takes.

    Two proposals of nearly equal score swap ranks by the rounding of a processor; content queries are tied to ranks:
    left free, the total differed by 2.02 % on one with AVX2 only and by less on one with AVX-512.
    """
    golden, meta = golden_arrays("train_step.npz"), golden_json("train_step.json")
    model = load_recipe(DINO(**TINY, num_denoising=12, denoising_rule="published"), meta["salts"]).train()
    counts = meta["box_counts"]
    batch = Batch.from_images(
        [recipe_image("step", *size) for size in meta["image_sizes"]],
        targets=[(golden[f"target{i}/boxes"], golden[f"target{i}/labels"]) for i in range(len(counts))],
    )
    noise = flat_draws_to_noise(golden, counts, meta["num_dn_group"], 0.5)
    chosen = []
    watch = model.query_selection.register_forward_hook(lambda *called: chosen.append(called[-1].token_indices))
    with torch.no_grad():
        model(batch, noise)
    watch.remove()
    model.query_selection.register_forward_pre_hook(lambda _, given: (*given[:2], chosen[0]))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, noise)
    losses = Criterion()(output, batch.targets)
    for term in ("loss_class_encoder", "loss_bbox_encoder", "loss_giou_encoder"):
        assert losses[term].item() == pytest.approx(meta["losses"][published_name(term)], rel=0.005), term
    assert losses["loss"].item() == pytest.approx(meta["total_weighted"], rel=0.01)
    losses["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item()
    assert norm == pytest.approx(meta["total_grad_norm_before_clip"], rel=0.05)
