"""The sampling core of exported graphs gives what the model's own gives."""

import pytest
import torch

from dino_lightning.export.sampling import exported_sampling, sample
from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention, dispatch

SHAPES = ((5, 7), (3, 4), (1, 2))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_as_the_models_own(coordinates):
    draws = torch.Generator().manual_seed(coordinates)
    cells, queries, heads, points = sum(height * width for height, width in SHAPES), 11, 2, 3
    value = torch.randn(2, cells, heads, 4, generator=draws)
    reference = torch.rand(2, queries, len(SHAPES), coordinates, generator=draws)
    offsets = 2 * torch.randn(2, queries, heads, len(SHAPES), points, 2, generator=draws)  # some outside of the maps
    logits = torch.randn(2, queries, heads, len(SHAPES) * points, generator=draws)
    inputs = (value, SHAPES, reference, offsets, logits)
    torch.testing.assert_close(sample(*inputs), dispatch.sample(*inputs), rtol=1e-5, atol=1e-5)


def test_the_model_has_its_own_again_after_tracing():
    attention = MultiScaleDeformableAttention(hidden_dim=8, num_levels=1, num_heads=2, num_points=1)
    own = attention.sample
    with pytest.raises(KeyError), exported_sampling(torch.nn.ModuleList([attention])):
        assert attention.sample is sample
        raise KeyError
    assert attention.sample is own
