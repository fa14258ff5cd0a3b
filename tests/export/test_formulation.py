"""The sampling core of exported graphs gives what the model's own gives."""

import pytest
import torch

from dino_lightning.export.check import drawn
from dino_lightning.export.formulation import exported_formulation, sample
from dino_lightning.export.traceable import TraceableDetector
from dino_lightning.model.deformable_attention import dispatch
from tests.export.exported import tiny_module

SHAPES = ((5, 7), (3, 4), (1, 2))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_as_the_models_own(coordinates):
    draws = torch.Generator().manual_seed(coordinates)
    cells, queries, heads, points = sum(height * width for height, width in SHAPES), 11, 2, 3
    value = torch.randn(2, cells, heads, 4, generator=draws)
    reference = torch.rand(2, queries, len(SHAPES), coordinates, generator=draws)
    offsets = 2 * torch.randn(2, queries, heads, len(SHAPES), points, 2, generator=draws)  # some outside of the maps
    logits = torch.randn(2, queries, heads, len(SHAPES) * points, generator=draws)
    others = (SHAPES, reference, offsets, logits)
    found = sample(value.flatten(2).transpose(1, 2), *others)
    torch.testing.assert_close(found, dispatch.sample(value, *others), rtol=1e-5, atol=1e-5)


def test_a_whole_model_gives_the_same_and_has_its_own_again_after_tracing():
    model = tiny_module().model
    detector = TraceableDetector(model)
    sizes = torch.tensor([[96, 128], [70, 90]])
    inputs = (model.normalize(torch.stack([drawn(96, 128, seed) for seed in (0, 1)])), sizes, sizes.clone())
    with torch.no_grad():
        expected = detector(*inputs)
        with pytest.raises(KeyError), exported_formulation(model):
            found = detector(*inputs)
            raise KeyError
        again = detector(*inputs)
    assert torch.equal(found[3], expected[3])  # else the boxes are those of other proposals
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    assert not torch.equal(found[1], expected[1])  # it was another formulation
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
