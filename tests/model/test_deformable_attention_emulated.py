"""The backward kernel in CUDA C++, compiled by g++ with `warp.h` and run on CPU tensors, one lane after the other."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dino_lightning.model.deformable_attention import cuda_kernels, dispatch, nvrtc

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
HEADER = Path(__file__).with_name("warp.h")


class Emulated:
    """In the place of `nvrtc.Kernel`."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def launch(self, grid, threads, arguments):
        assert threads == 32 * cuda_kernels.WARPS
        self.library.launch(*grid, nvrtc.addresses(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(autouse=True)
def emulated(monkeypatch, folder):
    @functools.cache
    def kernel(device, heads, levels, points, coordinates, dtypes, reference_gradient):
        macros = cuda_kernels.macros(
            heads=heads,
            levels=levels,
            points=points,
            coordinates=coordinates,
            dtypes=dtypes,
            reference_gradient=reference_gradient,
        )
        library = folder / f"{'_'.join(map(str, macros.values()))}.so"
        options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{cuda_kernels.SOURCE.parent}"]
        options += [f"-D{name}={value}" for name, value in macros.items()]
        subprocess.run(["g++", *options, "-x", "c++", str(HEADER), "-o", str(library)], check=True)
        return Emulated(library)

    monkeypatch.setattr(cuda_kernels, "_kernel", kernel)


def guarded(tensor):
    """The same numbers between others that are not numbers: whoever reads beyond them shows."""
    around = torch.full((tensor.numel() + 256,), float("nan"), dtype=tensor.dtype)
    inside = around[128:-128].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def draw(shapes, *, batch, queries, heads, points, coordinates, dtype, spread):
    draws = torch.Generator().manual_seed(3)
    tokens, levels = sum(height * width for height, width in shapes), len(shapes)

    def normal(*shape):
        return torch.randn(shape, generator=draws)

    value = normal(batch, tokens, heads, 32).to(dtype)
    reference = torch.rand((batch, queries, levels, coordinates), generator=draws)
    offsets = (normal(batch, queries, heads, levels, points, 2) * spread).to(dtype)
    return value, reference, offsets, normal(batch, queries, heads, levels * points).to(dtype)


def gradients(inputs, shapes, grad, *, reference_gradient=True):
    value, reference, offsets, logits = (guarded(one) for one in inputs)
    flat = [side for shape in shapes for side in shape]
    found = cuda_kernels.backward(
        grad,
        guarded(value.transpose(1, 2).contiguous()),
        reference,
        offsets,
        logits,
        flat,
        reference_gradient=reference_gradient,
    )
    return found[0].transpose(1, 2), *found[1:]


def compare(inputs, shapes, tolerance=2e-5):
    leaves = [one.float().requires_grad_() for one in inputs]
    out = dispatch._in_pytorch(leaves[0], shapes, *leaves[1:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(inputs[0].dtype)
    expected = torch.autograd.grad(out, leaves, grad.float())
    actual = gradients(inputs, shapes, grad)
    for name, one, target in zip(("value", "reference", "offsets", "logits"), actual, expected, strict=True):
        assert one.dtype == (torch.float32 if name == "reference" else inputs[0].dtype)
        rounding = torch.finfo(one.dtype).eps / 2
        bound = rounding * target.abs() + tolerance * target.abs().max()
        assert ((one.float() - target).abs() <= bound).all(), (name, (one.float() - target).abs().max())


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(
    ("levels", "points", "dtype", "heads"),
    [
        (4, 4, torch.float32, 8),
        (4, 4, torch.bfloat16, 8),
        (5, 3, torch.float32, 3),
        pytest.param(4, 4, torch.float16, 2, marks=pytest.mark.slow),
        pytest.param(5, 4, torch.bfloat16, 2, marks=pytest.mark.slow),
        pytest.param(8, 4, torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, torch.float32, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_those_of_pytorch(levels, points, dtype, heads, coordinates):
    """One query more than a block, levels of unlike sizes, down to one cell; places within and outside of them."""
    shapes = ((9, 12), (5, 6), (3, 3), (1, 4), (1, 1), (2, 1), (4, 7), (1, 2))[:levels]
    inputs = draw(
        shapes, batch=2, queries=9, heads=heads, points=points, coordinates=coordinates, dtype=dtype, spread=2.0
    )
    compare(inputs, shapes)


@pytest.mark.parametrize("far", [1e4, -1e30])
def test_places_far_outside_change_nothing(far):
    shapes = ((5, 7), (3, 4))
    value, reference, offsets, logits = draw(
        shapes, batch=1, queries=3, heads=2, points=4, coordinates=2, dtype=torch.float32, spread=1.0
    )
    for found in gradients((value, reference, torch.full_like(offsets, far), logits), shapes, torch.ones(1, 3, 64)):
        assert (found == 0).all()


def test_places_on_cells_and_borders():
    """Gradients of values and logits: those of places differ to the left and to the right."""
    shapes = ((4, 8),)
    x, y = torch.meshgrid(torch.arange(-1.0, 9.0, 0.5), torch.arange(-1.0, 5.0, 0.5), indexing="ij")
    offsets = torch.stack((x, y), -1).reshape(1, 30, 1, 1, 8, 2)
    value, _, _, logits = draw(
        shapes, batch=1, queries=30, heads=1, points=8, coordinates=2, dtype=torch.float32, spread=1.0
    )
    inputs = (value, torch.zeros(1, 30, 1, 2), offsets, logits)
    leaves = [one.requires_grad_() for one in inputs]
    grad = torch.randn((1, 30, 32), generator=torch.Generator().manual_seed(5))
    expected = torch.autograd.grad(dispatch._in_pytorch(leaves[0], shapes, *leaves[1:]), (value, logits), grad)
    by_value, none, _, by_logits = gradients([one.detach() for one in inputs], shapes, grad, reference_gradient=False)
    torch.testing.assert_close((by_value, by_logits), expected, rtol=1e-4, atol=1e-5)
    assert none.shape == (0,)


def test_what_is_not_a_number_stays_so_and_stays_where_it_is():
    shapes = ((5, 7), (3, 4))
    inputs = draw(shapes, batch=1, queries=4, heads=2, points=4, coordinates=4, dtype=torch.float32, spread=1.0)
    inputs[2][0, 1, 0] = float("nan")
    inputs[3][0, 2, 1] = float("nan")
    _, _, offsets, logits = gradients(inputs, shapes, torch.ones(1, 4, 64))
    lost = [[False, False], [True, False], [False, True], [False, False]]
    assert logits[0].isnan().all(-1).tolist() == lost == logits[0].isnan().any(-1).tolist()
    assert offsets[0].flatten(2).isnan().all(-1).tolist() == lost == offsets[0].flatten(2).isnan().any(-1).tolist()
