"""Which runs compile the layers of encoder and decoder, and what a failing compiler does to a run."""

import math
import warnings
from functools import partialmethod
from types import SimpleNamespace

import lightning
import pytest
import torch

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.errors import UsageError
from dino_lightning.model import DINO, compiled_layers
from dino_lightning.training import compilation
from dino_lightning.training.compilation import LEAST_BATCHES, check_graphs, choose
from tests.conftest import TINY_SIZES

PAYS = {"device_type": "cuda", "batches": LEAST_BATCHES, "one_size": True, "deterministic": False, "missing": None}


@pytest.mark.parametrize(
    ("option", "changes", "compiles", "reason"),
    [
        ("auto", {}, True, "3,000 batches or more"),
        ("auto", {"batches": math.inf}, True, "3,000 batches or more"),
        ("auto", {"batches": LEAST_BATCHES - 1}, False, "2,999 batches are fewer"),
        ("auto", {"device_type": "cpu"}, False, "CUDA"),
        ("auto", {"one_size": False}, False, "images of one size"),
        ("auto", {"deterministic": True}, False, "deterministic"),
        ("auto", {"missing": "there is no C compiler"}, False, "there is no C compiler"),
        (True, {"device_type": "cpu", "batches": 1, "deterministic": True, "missing": "Triton"}, True, "as chosen"),
        (False, {}, False, "as chosen"),
    ],
)
def test_layers_are_compiled_where_that_pays(option, changes, compiles, reason):
    choice = choose(option, **{**PAYS, **changes})
    assert choice.compiles is compiles and reason in choice.reason


def test_what_is_missing_to_compile_is_told(monkeypatch):
    monkeypatch.setattr(compilation.kernel_trial, "missing", lambda kind, index: None)
    monkeypatch.setenv("CC", "some-compiler")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: "/nowhere")
    assert "headers of Python" in compilation.missing_here(torch.device("cuda", 0))
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    assert compilation.missing_here(torch.device("cuda", 0)) == "there is no C compiler"
    monkeypatch.setattr(compilation.kernel_trial, "missing", lambda kind, index: "triton is not installed")
    assert compilation.missing_here(torch.device("cuda", 0)) == "triton is not installed"


def refuses(graph, inputs):
    raise RuntimeError("no C compiler")


def fitted(rooms, tmp_path, **options):
    torch.manual_seed(0)
    data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=2)
    module = DINOModule(num_classes=data.num_classes, backbone_weights=None, **{**TINY_SIZES, **options})
    lightning.Trainer(
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(module, data)
    return module


def test_a_run_says_whether_its_layers_are_compiled_and_ends_well_where_the_compiler_fails(
    rooms, tmp_path, monkeypatch, capsys
):
    plain = fitted(rooms, tmp_path)
    assert str(plain.compilation) == "no (it pays on CUDA devices only)" and capsys.readouterr().out == ""
    original = DINO.compile_layers
    monkeypatch.setattr(DINO, "compile_layers", partialmethod(original, "eager"))
    assert str(fitted(rooms, tmp_path, compile=True).compilation) == "yes (as chosen)"
    monkeypatch.setattr(DINO, "compile_layers", partialmethod(original, refuses))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        failed = fitted(rooms, tmp_path, compile=True)
    assert sum("run without being compiled" in str(warning.message) for warning in said) == 1
    assert str(failed.compilation).startswith("no (it failed: ") and "no C compiler" in str(failed.compilation)
    state = failed.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())


def test_with_auto_one_line_says_what_was_decided(monkeypatch, capsys):
    """On a stand-in for a CUDA device; nothing is compiled."""

    class Model:
        level_embedding = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0))
        compiled = 0

        def compile_layers(self, *, cuda_graphs):
            assert not cuda_graphs
            self.compiled += 1

    trainer = SimpleNamespace(
        max_epochs=None,
        max_steps=1750,
        global_step=1000,
        current_epoch=1,
        accumulate_grad_batches=4,
        datamodule=SimpleNamespace(pad_to=(640, 640)),
    )
    monkeypatch.setattr(compilation, "missing_here", lambda device: None)
    model = Model()
    compilation.Compilation("auto").begin(model, trainer)
    assert model.compiled == 1 and capsys.readouterr().out.count("\n") == 1
    trainer.max_epochs, trainer.num_training_batches = 3, 1499
    few = compilation.Compilation("auto")
    few.begin(model, trainer)
    assert model.compiled == 1 and "2,998 batches are fewer than the 3,000" in capsys.readouterr().out
    assert str(few).startswith("no (2,998 batches")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device_type": "cpu"}, "need a CUDA device"),
        ({"one_size": False}, "--data.fixed_size"),
        ({"compile": False}, "--model.compile false turns off"),
        ({"deterministic": True}, "deterministic"),
        ({"recomputes": True}, "--model.recompute_encoder"),
        ({}, None),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_be(changes, said):
    can_be = {"device_type": "cuda", "one_size": True, "deterministic": False, "recomputes": False, "compile": "auto"}
    given = {**can_be, **changes}
    if said is None:
        check_graphs(given.pop("compile"), **given)
        return
    with pytest.raises(UsageError, match=said) as refused:
        check_graphs(given.pop("compile"), **given)
    assert "leave out --model.cuda_graphs" in str(refused.value)


def test_a_run_says_whether_it_has_cuda_graphs(rooms, tmp_path, monkeypatch, capsys):
    """On a CPU that passes for a CUDA device; the graphs fail their trial."""
    with pytest.raises(UsageError, match="need a CUDA device"):
        fitted(rooms, tmp_path, cuda_graphs=True)
    assert fitted(rooms, tmp_path).compilation.of_graphs == "no (not asked for)"
    monkeypatch.setattr(compilation, "check_graphs", lambda *given, **more: None)
    original, trials = DINO.compile_layers, []
    monkeypatch.setattr(DINO, "compile_layers", partialmethod(original, "eager"))
    monkeypatch.setattr(compiled_layers, "GRAPHED", {"backend": "eager"})

    def trial(model, layers, batch):
        trials.append(layers)
        return "a replay is off by 9.0%" if len(trials) == 1 else None

    monkeypatch.setattr(compilation, "trouble_with_graphs", trial)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        failed = fitted(rooms, tmp_path, cuda_graphs=True)
    assert sum("without CUDA graphs, since those failed (a replay" in str(one.message) for one in warned) == 1
    assert failed.compilation.of_graphs == "no (it failed: a replay is off by 9.0%)"
    assert str(failed.compilation) == "yes (as chosen)"
    assert "recording them as CUDA graphs" in capsys.readouterr().out
    assert fitted(rooms, tmp_path, cuda_graphs=True).compilation.of_graphs == "yes (as chosen)"
    assert len(trials) == 2  # one a run, of two steps
