"""The detector through its public door: sizes, padding, emptiness, precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_lightning.losses import Criterion
from dino_lightning.model import DINO
from dino_lightning.structures import Batch
from tests.conftest import TINY_SIZES


def random_batch(sizes, counts, num_classes=3, pad_to=None):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    targets = []
    for count in counts:
        centre = torch.rand(count, 2, generator=generator) * 0.5 + 0.25
        boxes = torch.cat((centre, torch.rand(count, 2, generator=generator) * 0.3 + 0.1), dim=1)
        targets.append((boxes, torch.randint(0, num_classes, (count,), generator=generator)))
    return Batch.from_images(images, targets=targets, pad_to=pad_to)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_dim": 48, "num_heads": 6, "num_points": 3},
        {"feature_strides": [4, 8, 16, 32], "num_feature_levels": 5},
        {"feature_strides": [8, 16, 32], "num_feature_levels": 4},
        {"feature_strides": [32], "num_feature_levels": 1},
        {"feature_strides": [16], "num_feature_levels": 3},
        {"num_decoder_layers": 1},
        {"num_encoder_layers": 0},
        {"num_denoising": 0},
        {"dropout": 0.1},
        {"num_queries": 5000},  # more than there are tokens
    ],
    ids=str,
)
def test_every_size_trains_and_detects(changes):
    model = DINO(num_classes=3, **{**TINY_SIZES, **changes})
    batch = random_batch([(64, 96), (80, 48)], [2, 1])
    output = model.train()(batch)
    loss = Criterion()(output, batch.targets)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert (output.denoising is None) == (changes.get("num_denoising") == 0)
    layers = changes.get("num_decoder_layers", 2)
    queries = output.pred_boxes.shape[2]
    assert output.pred_logits.shape == (layers, 2, queries, 3)
    assert output.encoder_boxes.shape == (2, queries, 4)
    with torch.no_grad():
        again = model.eval()(batch)
    assert again.denoising is None
    assert ((again.pred_boxes >= 0) & (again.pred_boxes <= 1)).all()


@pytest.mark.parametrize("rule", ["boxes", "published"])
def test_a_few_denoising_boxes_are_a_few_queries(rule):
    """By the published rule 4 would be 8 groups of 2 * 3 queries, here one group; from 50 up the rules agree."""
    batch = random_batch([(64, 64), (64, 64)], [3, 1])
    counts = []
    for aim in (1, 4, 7, 49, 50, 100):
        with torch.no_grad():
            model = DINO(num_classes=3, **{**TINY_SIZES, "num_denoising": aim, "denoising_rule": rule}).train()
            denoising = model(batch).denoising
        assert denoising.pred_boxes.shape[2] == 2 * 3 * denoising.num_groups
        counts.append(denoising.num_groups)
    assert counts == {"boxes": [1, 1, 2, 16, 16, 33], "published": [2, 8, 14, 98, 16, 33]}[rule]


def test_impossible_denoising_is_refused():
    for options, named in (({"num_denoising": -1}, "num_denoising=-1"), ({"denoising_rule": "all"}, "'all'")):
        with pytest.raises(ValueError, match=named):
            DINO(num_classes=3, **{**TINY_SIZES, **options})


def test_fewer_tokens_than_queries_uses_every_token():
    model = DINO(num_classes=2, **{**TINY_SIZES, "num_queries": 900}).eval()
    with torch.no_grad():
        output = model(random_batch([(64, 64)], [1]))
    assert output.pred_logits.shape[2] == 4 * 4 + 2 * 2


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"hidden_dim": 30}, "multiple of 4"),
        ({"hidden_dim": 36, "num_heads": 8}, "multiple of num_heads"),
        ({"num_feature_levels": 1}, "num_feature_levels=1"),
        ({"feature_strides": [16, 8]}, "ascending"),
        ({"feature_strides": [64]}, "feature_strides"),
        ({"backbone": "resnet51"}, "Unknown backbone"),
        ({"backbone": "alexnet", "feature_strides": [8, 16]}, "alexnet"),
        ({"trainable_backbone_layers": 6}, "between 0 and 5"),
        ({"num_queries": 0}, "at least 1"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(changes, part):
    with pytest.raises(ValueError, match=part):
        DINO(**{"num_classes": 2, **TINY_SIZES, **changes})


def test_all_images_empty_still_reaches_every_parameter():
    """Plain DDP hangs or fails if a parameter gets no gradient on some process."""
    model = DINO(num_classes=3, **TINY_SIZES).train()
    batch = random_batch([(64, 64), (64, 80)], [0, 0])
    output = model(batch)
    assert output.denoising is None
    Criterion()(output, batch.targets)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_normalize_leaves_floating_point_images_alone():
    model = DINO(num_classes=1, **TINY_SIZES)
    image = torch.rand(1, 3, 8, 8)
    assert model.normalize(image) is image
    grey = model.normalize(torch.full((1, 3, 1, 1), 128, dtype=torch.uint8)).flatten()
    expected = [(128 / 255 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert grey.tolist() == pytest.approx(expected, abs=1e-5)


def test_bf16_autocast_stays_close_to_float32():
    # Weights and images of their own: with those that earlier tests happen to leave, matches may swap under rounding.
    torch.manual_seed(0)
    model = DINO(num_classes=3, **TINY_SIZES).train()
    batch = random_batch([(64, 96), (80, 48)], [2, 1])
    torch.manual_seed(0)
    exact = Criterion()(model(batch), batch.targets)["loss"]
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch)
        mixed = Criterion()(output, batch.targets)["loss"]
    assert output.pred_boxes.dtype == torch.float32
    assert mixed.dtype == torch.float32
    mixed.backward()
    assert mixed.item() == pytest.approx(exact.item(), rel=0.05)


def test_gradient_of_a_later_layer_reaches_the_offset_before_it():
    """Look forward twice: the last layer's box loss alone moves what the first layer predicted."""
    model = DINO(num_classes=3, **{**TINY_SIZES, "num_denoising": 0}).train()
    batch = random_batch([(64, 64)], [1])
    offsets = []

    def keep(module, args, out):
        out.retain_grad()
        offsets.append(out)

    model.decoder.bbox_head.register_forward_hook(keep)
    model(batch).pred_boxes[-1].sum().backward()
    first_refinement, boxes = offsets  # the boxes of both layers by one call
    assert boxes.grad[0].abs().sum() == 0
    assert first_refinement.grad.abs().sum() > 0
    assert boxes.grad[1].abs().sum() > 0


@pytest.mark.parametrize(
    "option", [{"denoising_multiple": 7}, {"denoising_multiple": 1000}, {"recompute_encoder": True}]
)
def test_options_of_speed_and_memory_change_no_loss_and_no_gradient(option):
    results = []
    for changes in ({}, option):
        torch.manual_seed(0)
        model = DINO(num_classes=3, **TINY_SIZES, **changes).train()
        torch.manual_seed(1)
        batch = random_batch([(64, 96), (80, 48)], [3, 1])
        losses = Criterion()(model(batch), batch.targets)
        losses["loss"].backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        results.append((losses, gradients))
    (losses, gradients), (other_losses, other_gradients) = results
    assert losses.keys() == other_losses.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], other_losses[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in gradients:
        torch.testing.assert_close(gradients[name], other_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_compiled_layers_keep_names_losses_and_gradients():
    """With the compiler's front half; what its back half makes of a graph is checked by the test marked slow."""
    check_compiled("aot_eager")


@pytest.mark.slow
def test_compiled_to_machine_code():
    """In a process of its own: the compiler imports setuptools; an old one fails if distutils was imported before."""
    check = "from tests.model.test_dino import check_compiled; check_compiled('inductor')"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def check_compiled(backend):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = DINO(num_classes=3, **TINY_SIZES).train()
        if compiled:
            model.compile_layers(backend)
        torch.manual_seed(1)
        batch = random_batch([(64, 96), (80, 48)], [3, 1])
        losses = Criterion()(model(batch), batch.targets)
        losses["loss"].backward()
        results.append((losses, {name: parameter.grad for name, parameter in model.named_parameters()}, model))
    (losses, gradients, _), (other_losses, other_gradients, compiled_model) = results
    assert gradients.keys() == other_gradients.keys()
    assert not any("_orig_mod" in name for name in compiled_model.state_dict())
    for name in losses:
        torch.testing.assert_close(losses[name], other_losses[name], rtol=1e-5, atol=1e-6, msg=name)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
