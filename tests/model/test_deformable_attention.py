"""Which implementation of deformable attention runs, and that all of them say the same."""

import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from dino_lightning import kernel_trial
from dino_lightning.model.deformable_attention import (
    MultiScaleDeformableAttention,
    dispatch,
    implementation_in_use,
    set_implementation,
)
from dino_lightning.model.deformable_attention.gathered import gathered, softmax
from dino_lightning.model.deformable_attention.reference import deformable_attention
from tests.golden_recipe import golden_arrays
from tests.interpreter import run_interpreted

PROJECT = Path(__file__).parents[2]
CALL = dispatch.Call("cuda", 0, torch.bfloat16, torch.bfloat16, torch.bfloat16, 8, 32, 4, 4, 2)
ENCODER = ((100, 134), (50, 67), (25, 34), (13, 17))  # 800 x 1066 pixels


@pytest.fixture
def choice():
    yield
    set_implementation("auto")


@pytest.fixture
def untried(monkeypatch):
    """No call has been tried in this process, and the kernel takes all of them that pass their trial."""
    monkeypatch.setattr(dispatch, "_missing", lambda call: None)
    monkeypatch.setattr(dispatch, "_found", {})
    monkeypatch.setattr(dispatch, "_found_of_cuda", {})
    monkeypatch.setattr(dispatch, "_tried_apart", lambda call: None)
    monkeypatch.setattr(kernel_trial, "_said_that_it_compiles", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a device")
    for known in (dispatch._trouble_with, dispatch._cuda_trouble_with):
        known.cache_clear()
    yield
    for known in (dispatch._trouble_with, dispatch._cuda_trouble_with):
        known.cache_clear()


def golden_module():
    golden = golden_arrays("msda.npz")
    module = MultiScaleDeformableAttention(hidden_dim=32, num_levels=3, num_heads=4, num_points=2)
    module.load_state_dict({name: golden[f"module_{name}"] for name in module.state_dict()})
    shapes = tuple((height, width) for height, width in golden["spatial_shapes"].tolist())
    return module, (golden["module_query"], golden["module_ref2_ref"], golden["module_src"], shapes), golden


def draw(shapes, *, queries, batch=2, heads=2, dim=8, points=2):
    """Inputs of the core: values, places of which some lie outside, weights."""
    draws = torch.Generator().manual_seed(2)
    tokens, levels = sum(height * width for height, width in shapes), len(shapes)
    value = torch.randn((batch, tokens, heads, dim), generator=draws)
    locations = torch.rand((batch, queries, heads, levels, points, 2), generator=draws) * 1.4 - 0.2
    weights = torch.rand((batch, queries, heads, levels, points), generator=draws)
    return value, shapes, locations, weights


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_deformable_attention.py"))


def test_a_cpu_needs_no_triton():
    """PyTorch and torchvision may import it all the same; here it cannot be imported."""
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, dino_lightning\n"
        "from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention, dispatch\n"
        "layer = MultiScaleDeformableAttention(hidden_dim=16, num_levels=1, num_heads=2, num_points=1)\n"
        "layer(torch.zeros(1, 3, 16), torch.zeros(1, 3, 1, 2), torch.zeros(1, 4, 16), ((2, 2),)).sum().backward()\n"
        "print([name for name in sys.modules if '.triton_' in name and name.startswith('dino')])\n"
        "torch.version.cuda, torch.cuda.get_device_capability = '12', lambda index: (8, 6)\n"
        "print(dispatch._trouble('cuda', 0, *[torch.float32] * 3, 8, 32, 4, 4, 2))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.splitlines() == ["[]", "triton is not installed"]


@pytest.mark.parametrize(
    "shapes", [((5, 7), (3, 4), (1, 1)), ((4, 4),), ((1, 9), (6, 1)), ((20, 20), (10, 10))], ids=str
)
@pytest.mark.parametrize("queries", [1, 11, 500])
@pytest.mark.parametrize("training", [True, False])
def test_gathered_is_the_plain_loop(shapes, queries, training):
    value, _, locations, weights = draw(shapes, queries=queries, batch=3)
    inputs = [tensor.requires_grad_(training) for tensor in (value, locations, weights)]
    grad = torch.randn((3, queries, 16), generator=torch.Generator().manual_seed(1))
    results = []
    for attend in (gathered, deformable_attention):
        out = attend(value, shapes, locations, weights)
        results.append([out.detach(), *(torch.autograd.grad(out, inputs, grad) if training else [])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_edges_are_on_the_side_that_grid_sample_puts_them():
    """At the start samples lie on the centres of cells, where the gradient jumps: rounding decides for both alike."""
    shapes = ((20, 33), (10, 17))
    value, _, _, weights = draw(shapes, queries=660)
    centres = torch.cartesian_prod(torch.arange(20) + 0.5, torch.arange(33) + 0.5).flip(-1) / torch.tensor([33, 20])
    steps = torch.arange(8).view(1, 1, 2, 2, 2, 1) / torch.tensor([[33, 20], [17, 10]]).view(1, 1, 1, 2, 1, 2)
    locations = (centres.view(1, 660, 1, 1, 1, 2) + steps).repeat(2, 1, 1, 1, 1, 1).requires_grad_()
    found = [
        torch.autograd.grad(attend(value, shapes, locations, weights).sum(), locations)[0]
        for attend in (gathered, deformable_attention)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_gradients_of_training_on_a_cpu():
    """Against numerical ones, in float64, with places outside of the maps."""
    value, shapes, locations, weights = draw(((3, 4), (2, 2)), queries=4)
    inputs = [tensor.double().requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, p, w: gathered(v, shapes, p, w), inputs)


@pytest.mark.parametrize("columns", [1, 4, 12, 16, 20])
def test_softmax(columns):
    logits = (torch.randn(3, 5, columns, dtype=torch.float64) * 30).requires_grad_()
    torch.testing.assert_close(softmax(logits), logits.softmax(-1))
    assert torch.autograd.gradcheck(softmax, logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_softmax_says_what_is_not_finite(bad):
    logits = torch.tensor([[1.0, bad, 3.0], [1.0, 2.0, 3.0]])
    torch.testing.assert_close(softmax(logits), logits.softmax(-1), equal_nan=True)


def test_gathered_golden_with_gradients():
    golden = golden_arrays("msda.npz")
    shapes = tuple((height, width) for height, width in golden["spatial_shapes"].tolist())
    names = ("value", "sampling_locations", "attention_weights")
    inputs = {name: golden[f"core_{name}"].requires_grad_() for name in names}
    out = gathered(inputs["value"], shapes, inputs["sampling_locations"], inputs["attention_weights"])
    torch.testing.assert_close(out, golden["core_output"], atol=1e-5, rtol=1e-5)
    out.backward(golden["core_grad_output"])
    for name in names:
        torch.testing.assert_close(inputs[name].grad, golden[f"core_grad_{name}"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_gathered_never_leaves_the_map(bad):
    value, shapes, locations, weights = draw(((5, 7), (3, 4)), queries=3)
    locations[0, 1] = bad
    out = gathered(value, shapes, locations, weights)
    expected = deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(out[1], expected[1])
    torch.testing.assert_close(out[0, ::2], expected[0, ::2])
    assert (out[0, 1] == 0).all() or out[0, 1].isnan().all()


@pytest.mark.parametrize(("batch", "queries"), [(0, 11), (2, 0)], ids=["no image", "no query"])
@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_to_attend_to(batch, queries, gradients):
    layer = MultiScaleDeformableAttention(hidden_dim=16, num_levels=1, num_heads=2, num_points=1)
    value = torch.zeros(batch, 6, 16, requires_grad=True)
    with torch.set_grad_enabled(gradients):
        out = layer(torch.zeros(batch, queries, 16), torch.zeros(batch, queries, 1, 2), value, ((2, 3),))
    assert out.shape == (batch, queries, 16)
    if gradients:
        assert torch.autograd.grad(out.sum(), value)[0].shape == value.shape


def test_unknown_implementation():
    with pytest.raises(ValueError, match="none of auto, pytorch, triton, cuda"):
        set_implementation("hip")


def test_triton_on_a_cpu_says_what_it_needs(choice):
    set_implementation("triton")
    module, arguments, _ = golden_module()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        module(*arguments)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 24}, "24 channels"),
        ({"levels": 9}, "more than 8 levels"),
        ({"value_dtype": torch.float64}, "no kernel for torch.float64"),
        ({"device_type": "mps"}, "device type mps"),
        ({}, None),
    ],
)
def test_what_the_kernel_takes(monkeypatch, change, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    found = dispatch._missing(CALL._replace(**change))
    assert (found is None) if reason is None else (reason in found)


def test_an_old_device_keeps_pytorch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "older than compute capability 8.0" in dispatch._missing(CALL)


class Trials:
    """Raises or returns these, one a trial."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def __call__(self, call):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


OUT_OF_MEMORY = torch.OutOfMemoryError("Tried to allocate 20.00 MiB")
BUSY = OSError(5, "Input/output error")
DRIVER = RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.mark.parametrize(
    ("outcomes", "reason"),
    [
        ([RuntimeError("Failed to find C compiler")], r"RuntimeError: Failed to find C compiler\)"),
        (["its output is off by 7.0% of the largest"], r"its output is off by 7.0% of the largest\)"),
        ([OUT_OF_MEMORY, OUT_OF_MEMORY], r"OutOfMemoryError: Tried to allocate 20.00 MiB; tried twice\)"),
        ([BUSY, BUSY], r"OSError: \[Errno 5\] Input/output error; tried twice\)"),
        ([DRIVER, "its output is off by 7.0% of the largest"], r"its output is off by 7.0% of the largest\)"),
    ],
)
def test_a_kernel_that_fails_its_trial_is_left_out_with_one_warning(monkeypatch, untried, outcomes, reason):
    trials = Trials(*outcomes)
    monkeypatch.setattr(dispatch, "_try", trials)
    with pytest.warns(UserWarning, match=rf"failed its trial on a device \({reason}") as warned:
        assert dispatch._trouble_with(CALL)
    assert len(warned) == 1 and not trials.outcomes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._trouble_with(CALL)
    said = implementation_in_use(torch.device("cuda", 0))
    assert said.startswith("PyTorch (") and "\n" not in said


@pytest.mark.parametrize("fault", [OUT_OF_MEMORY, BUSY, DRIVER], ids=lambda fault: type(fault).__name__)
def test_a_fault_that_passes_does_not_cost_the_kernel(monkeypatch, untried, fault):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(dispatch, "_try", Trials(fault, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._trouble_with(CALL) is None
    assert emptied == [True]
    assert implementation_in_use(torch.device("cuda")) == "Triton kernel"


def test_what_is_said_to_be_in_use(monkeypatch, untried, choice):
    device = torch.device("cuda", 0)
    assert implementation_in_use(torch.device("cpu")) == "PyTorch"
    assert implementation_in_use(device) == "not known yet"
    monkeypatch.setattr(dispatch, "_try", Trials(None))
    dispatch._trouble_with(CALL)
    monkeypatch.setattr(dispatch, "_missing", lambda call: f"no kernel for\n{call.value_dtype}")
    dispatch._trouble_with(CALL._replace(value_dtype=torch.float64))
    dispatch._trouble_with(CALL._replace(device_index=1))
    assert implementation_in_use(device) == "Triton kernel, for some calls PyTorch (no kernel for torch.float64)"
    assert implementation_in_use(torch.device("cuda", 1)) == "PyTorch (no kernel for torch.bfloat16)"
    torch.use_deterministic_algorithms(True)
    try:
        assert implementation_in_use(device) == "PyTorch (deterministic algorithms were asked for)"
    finally:
        torch.use_deterministic_algorithms(False)
    set_implementation("pytorch")
    assert implementation_in_use(device) == "PyTorch (as chosen)"


@pytest.mark.parametrize(
    ("implementation", "capability", "change", "takes"),
    [
        ("auto", (8, 0), {}, True),
        ("auto", (8, 6), {}, True),
        ("auto", (8, 9), {"levels": 5, "points": 3}, True),
        ("auto", (9, 0), {}, False),
        ("auto", (8, 6), {"dim": 16}, False),
        ("auto", (8, 6), {"levels": 8, "points": 5}, False),
        ("triton", (8, 6), {}, False),
        ("cuda", (9, 0), {}, True),
    ],
)
def test_which_devices_take_the_cuda_kernel(monkeypatch, untried, choice, implementation, capability, change, takes):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(dispatch, "_try", lambda call, cuda_backward: None if cuda_backward else "not asked for")
    set_implementation(implementation)
    assert dispatch._takes_cuda(16, CALL._replace(**change)) is takes
    assert not dispatch._takes_cuda(65536, CALL._replace(**change))
    with torch.no_grad():
        assert not dispatch._takes_cuda(16, CALL._replace(**change))


def test_a_cuda_kernel_that_fails_its_trial_leaves_the_gradients_to_triton(monkeypatch, untried, choice):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(dispatch, "_try", lambda call, cuda_backward=False: "no NVRTC" if cuda_backward else None)
    dispatch._trouble_with(CALL)
    with pytest.warns(UserWarning, match=r"computed by Triton.*failed its trial on a device \(no NVRTC\)"):
        assert not dispatch._takes_cuda(16, CALL)
    assert implementation_in_use(device) == "Triton kernel, backward as well (no NVRTC)"
    monkeypatch.setattr(dispatch, "_try", lambda call, cuda_backward=False: None)
    dispatch._takes_cuda(16, CALL._replace(coordinates=4))
    said = implementation_in_use(device)
    assert said == "Triton kernel, CUDA kernel backward, for some calls Triton (no NVRTC)"
    set_implementation("triton")
    assert implementation_in_use(device) == "Triton kernel"
    set_implementation("cuda")
    with pytest.raises(RuntimeError, match="cannot run in CUDA: no NVRTC"):
        dispatch._takes_cuda(16, CALL)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('its output is off')\nraise SystemExit(1)", "its output is off"),
        ("raise RuntimeError('no NVRTC')", "RuntimeError: no NVRTC"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "the process of its trial was ended by SIGSEGV"),
        ("import sys\nassert sys.argv[1] == 'a call'", None),
    ],
)
def test_a_trial_in_a_process_of_its_own(tmp_path, monkeypatch, code, said):
    (tmp_path / "the_trial.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "cache" / "kernel.passed"
    assert kernel_trial.in_a_process("the_trial", "a call", mark) == said
    assert mark.exists() is (said is None)
    (tmp_path / "the_trial.py").write_text("raise SystemExit(1)")
    assert kernel_trial.in_a_process("the_trial", "a call", mark) == (None if said is None else "its trial failed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel passes on a device")
def test_a_trial_apart_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a device")
    assert re.search("NVIDIA|CUDA", dispatch._tried_apart(CALL))
    assert not list(tmp_path.rglob("*.passed"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_who_waits_for_the_compiler_is_told_once_by_the_first_process(monkeypatch, untried, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    spoken = threading.Event()
    say_that_it_compiles = kernel_trial.say_that_it_compiles

    def say():
        say_that_it_compiles()
        spoken.set()

    def compiles(call):
        return None if spoken.wait(60) else "nothing was said"

    monkeypatch.setattr(kernel_trial, "SECONDS_OF_SILENCE", 0.01)
    monkeypatch.setattr(kernel_trial, "say_that_it_compiles", say)
    monkeypatch.setattr(dispatch, "_try", compiles)
    for coordinates in (2, 4):
        spoken.clear()
        assert dispatch._trouble_with(CALL._replace(coordinates=coordinates)) is None
    out, err = capsys.readouterr()
    expected = "Compiling kernels for this GPU: about 15 seconds the first time ...\n"
    assert (out, err) == ("", expected if rank == "0" else "")


def test_a_short_trial_says_nothing(monkeypatch, untried, capsys):
    """Triton found its kernels in its cache."""
    started = []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: started.append(timer))
    monkeypatch.setattr(dispatch, "_try", Trials(None))
    assert dispatch._trouble_with(CALL) is None
    assert [timer.finished.is_set() for timer in started] == [True]  # which it waits for before it speaks
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("mode", "said"), [(0, []), (2, [0, 2])])
def test_a_trial_waits_without_a_warning(monkeypatch, mode, said):
    """PyTorch warns whenever the mode is set; with warnings as errors the kernel would not be used."""
    seen = []

    def set_mode(new):
        seen.append(new)
        text = "Synchronization debug mode is a prototype feature and does not yet detect"
        warnings.warn(text, UserWarning)  # noqa: B028 - as torch does it

    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(dispatch, "_tried", lambda call, cuda_backward: None)
    assert dispatch._try(CALL) is None
    assert seen == said


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    module, arguments, golden = golden_module()
    out = torch.compile(module, fullgraph=True, backend=backend)(*arguments, golden["module_padding_mask"])
    torch.testing.assert_close(out, golden["module_ref2_output"], atol=1e-5, rtol=1e-5)
    out.backward(golden["core_grad_output"])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"module_ref2_gradparam_{name}"], atol=2e-5, rtol=1e-5)


def test_exported():
    module, arguments, golden = golden_module()
    program = torch.export.export(module, (*arguments, golden["module_padding_mask"]))
    out = program.module()(*arguments, golden["module_padding_mask"])
    torch.testing.assert_close(out, golden["module_ref2_output"], atol=1e-5, rtol=1e-5)


def gpu_inputs(queries, coordinates, dtype, batch=2):
    draws = torch.Generator().manual_seed(4)
    tokens = sum(height * width for height, width in ENCODER)
    normal = {
        "value": (batch, tokens, 8, 32),
        "offsets": (batch, queries, 8, 4, 4, 2),
        "logits": (batch, queries, 8, 16),
    }
    inputs = {name: torch.randn(shape, generator=draws).to("cuda", dtype) for name, shape in normal.items()}
    inputs["reference"] = torch.rand((batch, queries, 4, coordinates), generator=draws).cuda()
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def outcome(sample, inputs, grad):
    out = sample(inputs["value"], ENCODER, inputs["reference"], inputs["offsets"], inputs["logits"])
    gradients = torch.autograd.grad(out, list(inputs.values()), grad)
    return {"out": out.detach(), **dict(zip(inputs, gradients, strict=True))}


def places_of(reference, offsets):
    """Places as shares of the map, and in cells, counted from the centre of the first; of the dtype of the inputs."""
    sizes = torch.tensor([(width, height) for height, width in ENCODER], device="cuda", dtype=offsets.dtype)[:, None]
    reference = reference[:, :, None, :, None]
    unit = 1 / sizes if reference.shape[-1] == 2 else reference[..., 2:] / (2 * offsets.shape[4])
    locations = reference[..., :2] + offsets * unit
    return locations, locations.detach() * sizes - 0.5


def exactly(value, shapes, reference, offsets, logits):
    weights = logits.softmax(-1).view(offsets.shape[:-1])
    return deformable_attention(value, shapes, places_of(reference, offsets)[0], weights)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "cuda", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "coordinates"), [(17821, 2), (1100, 4)], ids=["encoder", "decoder"])
def test_against_float64_on_a_device(choice, queries, coordinates, dtype, implementation):
    inputs = gpu_inputs(queries, coordinates, dtype)
    grad = torch.randn((2, queries, 256), generator=torch.Generator().manual_seed(6)).to("cuda", dtype)
    set_implementation(implementation)
    actual = outcome(dispatch.sample, inputs, grad)
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expected = outcome(exactly, double, grad.double())

    # Places in float32 are off by a few roundings of the longest side, in cells; what is sampled moves as far.
    place_error = 4 * 2.0**-24 * max(side for shape in ENCODER for side in shape)
    # A place on the line between two cells may count for either; the gradients of places differ there by a step.
    places = places_of(double["reference"], double["offsets"])[1]
    on_line = (places - places.round()).abs() < place_error
    excused = {"offsets": on_line, "reference": on_line.any(4).any(2).repeat(1, 1, 1, coordinates // 2)}
    assert on_line.double().mean() < 1e-3
    for name, target in expected.items():
        assert actual[name].dtype == (torch.float32 if name == "reference" else dtype)
        rounding = torch.finfo(actual[name].dtype).eps / 2
        bound = rounding * target.abs() + place_error * target.abs().max()
        off = (actual[name].double() - target).abs() / bound
        off[excused.get(name, torch.zeros_like(off, dtype=torch.bool))] = 0.0
        assert off.max() <= 1.0, (name, off.max())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_a_device_takes_the_kernel_and_never_waits():
    module = MultiScaleDeformableAttention(hidden_dim=256, num_levels=4, num_heads=8, num_points=4).cuda()
    tokens = sum(height * width for height, width in ENCODER)
    source = torch.randn(1, tokens, 256, device="cuda")
    query, reference = torch.randn(1, 300, 256, device="cuda"), torch.rand(1, 300, 4, 4, device="cuda")

    def step(shapes=ENCODER):
        with torch.autocast("cuda", torch.bfloat16):
            out = module(query, reference, source, shapes)
        out.float().square().mean().backward()
        return out

    half = torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        assert dispatch._trouble_with(dispatch.Call("cuda", 0, half, half, half, 8, 32, 4, 4, 4)) is None
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        step(((134, 100), (67, 50), (34, 25), (17, 13)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
# PyTorch's own, while its compiler is imported, and its advice on float32.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_compiled_on_a_device():
    module = MultiScaleDeformableAttention(hidden_dim=256, num_levels=4, num_heads=8, num_points=4).cuda()
    tokens = sum(height * width for height, width in ENCODER)
    source = torch.randn(1, tokens, 256, device="cuda")
    query, reference = torch.randn(1, 300, 256, device="cuda"), torch.rand(1, 300, 4, 4, device="cuda")
    out = torch.compile(module, fullgraph=True)(query, reference, source, ENCODER)
    torch.testing.assert_close(out, module(query, reference, source, ENCODER), atol=1e-3, rtol=1e-3)
    out.sum().backward()
