"""The Triton kernels in Triton's interpreter, on CPU tensors.

TRITON_INTERPRET=1 must be set before Triton is imported, so `test_deformable_attention.py` runs this file in a process
of its own; by hand: `TRITON_INTERPRET=1 python -m pytest -n 0 tests/model/interpreted_deformable_attention.py`.
"""

import os

import pytest
import torch

from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention, set_implementation
from dino_lightning.model.deformable_attention.fused import deformable_attention
from tests.golden_recipe import golden_arrays

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 first"

NAMES = ("value", "reference", "offsets", "logits")
# Largest relative error of one rounding. The interpreter cuts bfloat16 off, which a device rounds: twice the error.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def in_triton():
    set_implementation("triton")
    yield
    set_implementation("auto")


def dense(value, reference, offsets, logits, shapes):
    """Bilinear samples as hat functions over all cells: slow, of any precision, with nothing taken from the kernel."""
    batch, heads, _, dim = value.shape
    queries, points = offsets.shape[1], offsets.shape[4]
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    out, start = 0.0, 0
    for level, (height, width) in enumerate(shapes):
        size = torch.tensor([width, height], dtype=value.dtype)
        anchor = reference[:, :, None, level, None]
        step = 1 / size if reference.shape[-1] == 2 else anchor[..., 2:] / points * 0.5
        x, y = ((anchor[..., :2] + offsets[:, :, :, level] * step) * size - 0.5).unbind(-1)
        along = (1 - (x[..., None] - torch.arange(width)).abs()).relu()
        down = (1 - (y[..., None] - torch.arange(height)).abs()).relu()
        cells = value[:, :, start : start + height * width].reshape(batch, heads, height, width, dim)
        out = out + torch.einsum("bqhp,bqhpi,bqhpj,bhijc->bqhc", weights[:, :, :, level], down, along, cells)
        start += height * width
    return out.reshape(batch, queries, heads * dim)


def draw(shapes, *, batch=2, queries=5, heads=2, dim=16, points=2, coordinates=2, dtype=torch.float32, spread=2.0):
    draws = torch.Generator().manual_seed(3)
    tokens, levels = sum(height * width for height, width in shapes), len(shapes)

    def normal(*shape):
        return torch.randn(shape, generator=draws)

    return {
        "value": normal(batch, heads, tokens, dim).to(dtype).requires_grad_(),
        "reference": torch.rand((batch, queries, levels, coordinates), generator=draws).requires_grad_(),
        "offsets": (normal(batch, queries, heads, levels, points, 2) * spread).to(dtype).requires_grad_(),
        "logits": normal(batch, queries, heads, levels * points).to(dtype).requires_grad_(),
    }


def flat(shapes):
    return [side for shape in shapes for side in shape]


def compare(inputs, shapes, names=NAMES):
    """Output and gradients against the dense sum in float64, each within the rounding of its dtype."""
    out = deformable_attention(*inputs.values(), flat(shapes))
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = dense(*exact.values(), shapes)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    actuals = torch.autograd.grad(out, [inputs[name] for name in names], grad)
    expecteds = torch.autograd.grad(expected, [exact[name] for name in names], grad.double())
    for name, actual, target in zip(("out", *names), (out, *actuals), (expected, *expecteds), strict=True):
        assert actual.dtype == (out.dtype if name == "out" else inputs[name].dtype)
        # Rounded once, at the end; before that float32 sums of terms of the size of the largest entry.
        rtol = ROUNDING[actual.dtype]
        atol = 3e-6 * max(1.0, float(target.detach().abs().max()))
        if actual.dtype == torch.float16:
            atol = max(atol, 2.0**-24)  # the smallest float16
        torch.testing.assert_close(actual.double(), target, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_dense_sum_has_the_gradients_of_its_own_differences():
    shapes = ((2, 3), (1, 1))
    for coordinates in (2, 4):
        inputs = draw(shapes, batch=1, queries=2, heads=1, dim=2, coordinates=coordinates, spread=0.7)
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs.values()]
        assert torch.autograd.gradcheck(lambda *args: dense(*args, shapes), exact)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        (((5, 7), (3, 4), (1, 1)), {"queries": 5}),
        (((4, 4),), {"queries": 17, "points": 4}),  # one level, one more query than a block of the backward pass of 32
        (((1, 9), (6, 1)), {"dim": 32, "points": 3, "queries": 17}),
        (((3, 5), (2, 2)), {"dim": 64, "heads": 1}),
        (((2, 3),), {"dim": 8, "heads": 3, "points": 1}),
        (((2, 3), (1, 2)), {"dim": 128, "heads": 1, "batch": 1}),
        (tuple((2, 1 + level) for level in range(8)), {"batch": 1, "queries": 2, "points": 1}),
    ],
    ids=str,
)
def test_odd_shapes(shapes, sizes, coordinates):
    compare(draw(shapes, coordinates=coordinates, **sizes), shapes)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, coordinates):
    shapes = ((5, 7), (3, 4))
    compare(draw(shapes, dim=32, points=4, dtype=dtype, coordinates=coordinates), shapes)


def test_each_input_may_have_its_own_dtype():
    shapes = ((5, 7), (3, 4))
    inputs = draw(shapes, batch=1)
    inputs["offsets"] = inputs["offsets"].detach().bfloat16().requires_grad_()
    inputs["logits"] = inputs["logits"].detach().half().requires_grad_()
    compare(inputs, shapes)


def test_most_points_outside():
    shapes = ((5, 7), (3, 4))
    compare(draw(shapes, spread=30.0), shapes)


@pytest.mark.parametrize("far", [1e4, -1e9, 1e30])
def test_points_far_outside_read_zero(far):
    inputs = draw(((5, 7), (3, 4)))
    inputs["offsets"] = torch.full_like(inputs["offsets"], far).requires_grad_()
    out = deformable_attention(*inputs.values(), [5, 7, 3, 4])
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), list(inputs.values())):
        assert (grad == 0).all()


def test_points_exactly_on_cells_and_borders():
    """There the way to the left and the way to the right have different slopes: only the places' gradients are free."""
    shapes = ((4, 8),)
    steps = torch.arange(-1.0, 9.5, 0.5)
    x, y = torch.meshgrid(steps, torch.arange(-1.0, 5.5, 0.5), indexing="ij")
    places = torch.stack((x, y), -1).reshape(1, 1, 1, 1, -1, 2)
    inputs = draw(shapes, batch=1, queries=1, heads=1, points=places.shape[-2])
    inputs["reference"] = torch.zeros(1, 1, 1, 2)
    inputs["offsets"] = places
    compare(inputs, shapes, names=("value", "logits"))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}])
def test_nothing_to_do(sizes):
    inputs = draw(((5, 7), (3, 4)), **sizes)
    out = deformable_attention(*inputs.values(), [5, 7, 3, 4])
    assert out.shape == (sizes.get("batch", 2), sizes.get("queries", 5), 32)
    grads = torch.autograd.grad(out.sum(), list(inputs.values()))
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs.values()]
    assert not any(grad.any() for grad in grads)


def test_a_large_logit_takes_all():
    inputs = draw(((5, 7), (3, 4)))
    with torch.no_grad():
        inputs["logits"][..., 1] = 3e4
    compare(inputs, ((5, 7), (3, 4)))


def test_what_is_not_a_number_stays_so():
    inputs = draw(((5, 7), (3, 4)))
    with torch.no_grad():
        inputs["offsets"][0, 1] = float("nan")
        inputs["logits"][1, 2] = float("nan")
    out = deformable_attention(*inputs.values(), [5, 7, 3, 4])
    lost = out.isnan().all(-1)
    assert lost.tolist() == [[False, True, False, False, False], [False, False, True, False, False]]
    assert not out[~lost].isnan().any()


def test_gradients_that_nobody_asks_for():
    inputs = draw(((5, 7), (3, 4)))
    inputs["reference"].requires_grad_(False)
    out = deformable_attention(*inputs.values(), [5, 7, 3, 4])
    out.sum().backward()
    assert inputs["reference"].grad is None
    assert inputs["value"].grad.abs().sum() > 0


def test_golden_core():
    golden = golden_arrays("msda.npz")
    shapes = tuple((height, width) for height, width in golden["spatial_shapes"].tolist())
    sizes = torch.tensor([[width, height] for height, width in shapes])[None, None, None, :, None]
    weights = golden["core_attention_weights"].flatten(3)
    inputs = {
        "value": golden["core_value"].transpose(1, 2).contiguous().requires_grad_(),
        "reference": torch.zeros(2, 11, 3, 2),
        "offsets": (golden["core_sampling_locations"] * sizes).requires_grad_(),
        "logits": weights.log().requires_grad_(),
    }
    out = deformable_attention(*inputs.values(), flat(shapes))
    torch.testing.assert_close(out, golden["core_output"], atol=1e-5, rtol=1e-5)
    out.backward(golden["core_grad_output"])
    by_weight = golden["core_grad_attention_weights"].flatten(3)
    for actual, expected in (
        (inputs["value"].grad.transpose(1, 2), golden["core_grad_value"]),
        (inputs["offsets"].grad * sizes, golden["core_grad_sampling_locations"]),
        (inputs["logits"].grad, weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True))),
    ):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def golden_module():
    golden = golden_arrays("msda.npz")
    module = MultiScaleDeformableAttention(hidden_dim=32, num_levels=3, num_heads=4, num_points=2)
    module.load_state_dict({name: golden[f"module_{name}"] for name in module.state_dict()})
    shapes = tuple((height, width) for height, width in golden["spatial_shapes"].tolist())
    return golden, module, shapes


@pytest.mark.parametrize("case", ["ref2", "ref4"])
def test_golden_module(case):
    golden, module, shapes = golden_module()
    query, reference, source = (
        golden[name].requires_grad_() for name in ("module_query", f"module_{case}_ref", "module_src")
    )
    out = module(query, reference, source, shapes, golden["module_padding_mask"])
    torch.testing.assert_close(out, golden[f"module_{case}_output"], atol=1e-5, rtol=1e-5)
    out.backward(golden["core_grad_output"])
    for name, tensor in (("query", query), ("ref", reference), ("src", source)):
        torch.testing.assert_close(tensor.grad, golden[f"module_{case}_grad_{name}"], atol=2e-5, rtol=1e-5)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"module_{case}_gradparam_{name}"], atol=2e-5, rtol=1e-5)


def test_autocast():
    golden, module, shapes = golden_module()
    arguments = (golden["module_query"], golden["module_ref4_ref"], golden["module_src"], shapes)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*arguments)
        set_implementation("pytorch")
        expected = module(*arguments)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_operator(coordinates):
    inputs = draw(((3, 4), (1, 2)), batch=1, queries=3, coordinates=coordinates)
    torch.library.opcheck(
        torch.ops.dino_lightning.deformable_attention.default, (*inputs.values(), [3, 4, 1, 2]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_operator_of_the_backward_pass(wanted):
    inputs = [tensor.detach() for tensor in draw(((3, 4), (1, 2)), batch=1, queries=3).values()]
    grad = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    torch.library.opcheck(
        torch.ops.dino_lightning.deformable_attention_backward.default,
        (grad, *inputs, [3, 4, 1, 2], wanted),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    golden, module, shapes = golden_module()
    arguments = (golden["module_query"], golden["module_ref2_ref"], golden["module_src"], shapes)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    out = compiled(*arguments, golden["module_padding_mask"])
    torch.testing.assert_close(out, golden["module_ref2_output"], atol=1e-5, rtol=1e-5)
    out.backward(golden["core_grad_output"])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"module_ref2_gradparam_{name}"], atol=2e-5, rtol=1e-5)


def test_exported():
    golden, module, shapes = golden_module()
    arguments = (golden["module_query"], golden["module_ref2_ref"], golden["module_src"], shapes)
    program = torch.export.export(module, (*arguments, golden["module_padding_mask"]))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "dino_lightning.deformable_attention.default" in targets
    out = program.module()(*arguments, golden["module_padding_mask"])
    torch.testing.assert_close(out, golden["module_ref2_output"], atol=1e-5, rtol=1e-5)


def test_auto_leaves_a_cpu_alone():
    set_implementation("auto")
    golden, module, shapes = golden_module()
    arguments = (golden["module_query"], golden["module_ref2_ref"], golden["module_src"], shapes)
    targets = [str(node.target) for node in torch.export.export(module, arguments).graph.nodes]
    assert "dino_lightning.deformable_attention.default" not in targets
