"""Weights by name: the table, fetching over a loopback server, and training that starts from them."""

import hashlib
import inspect
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from dino_lightning import DINOModule, load_detector
from dino_lightning.__main__ import run
from dino_lightning.errors import CheckpointError
from dino_lightning.files import sha256_of
from dino_lightning.model import DINO
from dino_lightning.training.initial_weights import detector_weights
from dino_lightning.weights import zoo as zoo_module
from dino_lightning.weights.foreign_layouts import from_official, official_keys
from dino_lightning.weights.loading import load_initial_weights, load_weights
from dino_lightning.weights.published_layout import backbone_kind, from_published, from_published_key, to_published
from dino_lightning.weights.reading import read_weights
from tests.conftest import TINY_ARGS, TINY_SIZES
from tests.weights.test_foreign_layouts import manifest

POSITION = {"position_temperature": 10000.0, "position_offset": -0.5}


class Server:
    """Files by path over HTTP; counts what is asked."""

    def __init__(self):
        self.files, self.asked = {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *args):
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.httpd.server_port}/"
        threading.Thread(target=partial(self.httpd.serve_forever, poll_interval=0.01), daemon=True).start()


def tiny_detrex(path, classes=2, **changes):
    """A file as detrex writes it, of a detector with heads for each layer; and the detector."""
    torch.manual_seed(3)
    model = DINO(**{**TINY_SIZES, "num_classes": classes, "shared_heads": False, **POSITION, **changes})
    torch.save({"model": from_official("detrex", to_published(model.state_dict()))}, path)
    return model.eval()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dino_lightning" / "weights"


@pytest.fixture
def served(tmp_path, cache, monkeypatch):
    """A table with the weights `dino_tiny`, which a server on this machine has, behind an address that it has not."""
    server = Server()
    server.model = tiny_detrex(tmp_path / "tiny.pth")
    server.files["/mirror/tiny.pth"] = (tmp_path / "tiny.pth").read_bytes()
    server.sha256 = hashlib.sha256(server.files["/mirror/tiny.pth"]).hexdigest()
    table = yaml.safe_load(zoo_module.TABLE.read_text())
    table["bases"]["detrex"] = server.base
    sizes = {name: value for name, value in TINY_SIZES.items() if name not in ("feature_strides", "num_feature_levels")}
    table["backbones"]["tiny"] = sizes
    table["weights"] = {
        "dino_tiny": {
            "layout": "detrex",
            "backbone": "tiny",
            "epochs": 1,
            "ap": 1.0,
            "file": "gone/tiny.pth",
            "mirrors": [f"{server.base}mirror/tiny.pth"],
            "sha256": server.sha256[:8],
            "levels": 2,
        }
    }
    monkeypatch.setattr(zoo_module, "TABLE", tmp_path / "zoo.yaml")
    monkeypatch.setitem(zoo_module.STRIDES, 2, TINY_SIZES["feature_strides"])
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(table))
    zoo_module.zoo.cache_clear()
    yield server
    zoo_module.zoo.cache_clear()
    server.httpd.shutdown()
    server.httpd.server_close()


GOLDEN_SHAPES = {
    "dino_r50_4scale_24ep": ("detrex", "4scale_r50"),
    "dino_r50_5scale_12ep": ("detrex", "5scale_r50"),
    "dino_r101_4scale_12ep": ("detrex", "4scale_r101"),
    "dino_swin_t_4scale": ("detrex", "4scale_swint"),
    "dino_swin_l_4scale": ("detrex", "4scale_swinl"),
    "dino_swin_l_5scale": ("detrex", "5scale_swinl"),
    "dino_convnext_t_4scale": ("detrex", "4scale_convnext_t"),
    "mmdet_r50_4scale_12ep": ("mmdet", "4scale_r50"),
    "mmdet_swin_l_5scale_12ep": ("mmdet", "5scale_swinl"),
}


@pytest.mark.parametrize(("name", "golden"), GOLDEN_SHAPES.items())
def test_the_options_of_a_name_make_the_model_that_its_weights_fit(name, golden):
    project, model_name = golden
    row = zoo_module.zoo()[name]
    assert row.layout == project
    with torch.device("meta"):
        own = DINO(num_classes=80, **row.options).state_dict()
    entries = manifest(project, model_name)
    keys = official_keys(project, dict.fromkeys(entries))
    kind = backbone_kind(keys.values())
    found = {}
    for key, official in keys.items():
        shape = entries[key]["shape"]
        if official == "label_enc.weight":
            shape = [shape[0] + 1, *shape[1:]]
        found[from_published_key(official, kind, shared_heads=False)] = torch.Size(shape).numel()
    without_bias = {key for key in own if project == "mmdet" and key.startswith("neck") and key.endswith(".0.bias")}
    assert found.keys() == own.keys() - without_bias
    assert all(own[key].numel() == count for key, count in found.items())


def test_every_row_is_whole():
    arguments = inspect.signature(DINO).parameters
    files = [row.file for row in zoo_module.zoo().values()]
    assert len(files) == len(set(files)) > 25
    for row in zoo_module.zoo().values():
        assert row.options.keys() <= arguments.keys() and row.ap > 45 and row.epochs in (12, 24, 36)
        assert all(address.startswith("https://") for address in row.addresses)
        assert zoo_module.named(f"/somewhere/0123456789ab-{row.file}") is row
        assert row.sha256 == "" or row.sha256 in row.file


def test_the_table_as_a_user_sees_it(served, cache, capsys):
    assert run(["weights"]) == 0
    printed = capsys.readouterr().out
    assert "dino_tiny" in printed and "rooms_small" in printed and " no\n" in printed and not served.asked
    assert run(["weights", "get", "dino_tiny"]) == 0
    assert str(cache) in capsys.readouterr().out
    assert served.asked == ["/gone/tiny.pth", "/mirror/tiny.pth"]
    assert run(["weights"]) == 0
    assert " MB\n" in capsys.readouterr().out
    assert run(["weights", "get", "rooms_small"]) == 0
    assert "rooms_small.pt" in capsys.readouterr().out
    assert run(["weights", "get", "dino_tyni"]) == 1
    assert "Did you mean dino_tiny?" in capsys.readouterr().err


def test_fit_starts_by_name_with_the_options_that_the_weights_need(served, rooms, tmp_path, caplog, capfd):
    """Sizes and position embedding come from the table; of the model's, only the number of classes is the data's."""
    args = [arg for arg in TINY_ARGS if not any(arg.startswith(f"--model.{name}=") for name in TINY_SIZES)]
    args += ["--data.root", str(rooms), "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    with caplog.at_level("INFO"):
        assert run(["fit", *args, "--model.weights", "dino_tiny", "--run_dir", str(tmp_path / "run")]) == 0
    assert "loaded" in caplog.text + capfd.readouterr().err
    stored = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["shared_heads"] is False
    assert stored["hyper_parameters"]["position_offset"] == -0.5
    assert "model.decoder.class_head.1.bias" in stored["state_dict"]
    assert load_detector(tmp_path / "run").class_names == ("room",)
    before = len(served.asked)
    args += ["--run_dir", str(tmp_path / "other")]
    assert run(["fit", *args, "--model.weights=dino_tiny", "--model.position_offset=0.3"]) == 1
    assert len(served.asked) == before


def test_an_option_that_contradicts_the_weights_is_an_error(served):
    module = DINOModule(num_classes=2, weights="dino_tiny")
    assert module.hparams["position_offset"] == -0.5 and module.hparams["num_queries"] == TINY_SIZES["num_queries"]
    load_initial_weights(module.model, "dino_tiny")
    assert torch.equal(module.model.level_embedding, served.model.level_embedding)
    other = DINOModule(num_classes=2, weights="dino_tiny", position_offset=0.0)
    with pytest.raises(CheckpointError, match=r"only with --model\.position_offset=-0\.5"):
        load_initial_weights(other.model, "dino_tiny")
    with pytest.raises(CheckpointError, match=r"--model\.shared_heads=False"):
        load_initial_weights(DINO(**{**TINY_SIZES, "num_classes": 2}, **POSITION), "dino_tiny")


def test_a_wrong_file_is_not_loaded_and_one_put_by_hand_is_taken(served, cache):
    served.files["/mirror/tiny.pth"] += b"more"
    with pytest.raises(CheckpointError) as refused:
        zoo_module.fetch(zoo_module.zoo()["dino_tiny"])
    said = str(refused.value)
    assert "gone/tiny.pth" in said and "404" in said and "not the expected file" in said
    by_hand = cache / "tiny.pth"
    assert f"put it at {by_hand}" in said
    by_hand.write_bytes(served.files["/mirror/tiny.pth"])
    with pytest.raises(CheckpointError, match="does not begin with"):
        zoo_module.fetch(zoo_module.zoo()["dino_tiny"])
    by_hand.write_bytes(served.files["/mirror/tiny.pth"][:-4])
    assert zoo_module.fetch(zoo_module.zoo()["dino_tiny"]) == by_hand


def test_two_processes_at_once_fetch_a_file_once(served, cache):
    """As the ranks of a run that starts by name."""
    script = "import sys; from pathlib import Path; from dino_lightning.weights import zoo; "
    script += (
        f"zoo.TABLE = Path({str(zoo_module.TABLE)!r}); zoo.STRIDES[2] = [16, 32]; print(zoo.weights_file('dino_tiny'))"
    )
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0].split()[-1] for process in started)
    assert first == second and sha256_of(Path(first)) == served.sha256
    assert served.asked.count("/mirror/tiny.pth") == 1


def test_a_name_that_is_none_lists_near_ones():
    with pytest.raises(CheckpointError, match=r"Did you mean dino_r50_4scale_24ep.*`python -m dino_lightning weights`"):
        load_initial_weights(DINO(**{**TINY_SIZES, "num_classes": 2}), "dino_r50_4scale_24e")


def test_a_foreign_file_without_a_known_name_says_what_is_assumed(tmp_path):
    theirs = tiny_detrex(tmp_path / "model_final.pth")
    model = DINO(**{**TINY_SIZES, "num_classes": 2, "shared_heads": False})
    report = str(load_weights(model, tmp_path / "model_final.pth"))
    assert "does not say how detrex embedded the positions; assumed is position_temperature 20" in report
    assert torch.equal(model.level_embedding, theirs.level_embedding)


def convert(*args):
    return run(["convert", *map(str, args)])


def test_conversion_of_foreign_files(served, tmp_path, capsys):
    """By name to ours, with what the weights need; to both other layouts, and back to the same values."""
    tiny_detrex(tmp_path / "model_final.pth")
    assert convert("--weights", tmp_path / "model_final.pth", "--output", tmp_path / "no.ckpt") == 1
    assert "give it the name that it was published under" in capsys.readouterr().err
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tiny.pth").write_bytes((tmp_path / "model_final.pth").read_bytes())
    own = read_weights(tmp_path / "here" / "tiny.pth").state
    assert own.keys() == served.model.state_dict().keys()
    for layout in ("published", "detrex", "mmdet"):
        assert (
            convert("--weights", tmp_path / "here" / "tiny.pth", "--output", tmp_path / layout, "--layout", layout) == 0
        )
        assert "position_temperature 10000, position_offset -0.5, box_epsilon 0.001" in capsys.readouterr().out
        found = read_weights(tmp_path / layout)
        assert found.layout == (None if layout == "published" else layout)
        for key, value in own.items():
            assert torch.equal(found.state[key], value) or key == "label_embedding.weight"


def test_heads_that_differ_are_kept_and_two_values_of_one_entry_refused():
    """The published layout has room for heads of each layer's own: none of them is dropped without a word."""
    model = DINO(**{**TINY_SIZES, "num_classes": 2})
    published = to_published(model.state_dict())
    assert from_published(published)[0].keys() == model.state_dict().keys()
    for name in ("class_embed.1.bias", "transformer.decoder.class_embed.1.bias"):
        published[name] = published[name] + 100
    ours, _ = from_published(published)
    assert torch.equal(ours["decoder.class_head.1.bias"], ours["decoder.class_head.0.bias"] + 100)
    separate = DINO(**{**TINY_SIZES, "num_classes": 2, "shared_heads": False})
    separate.load_state_dict(ours)
    again = to_published(separate.state_dict())
    assert again.keys() == published.keys() and all(torch.equal(again[key], published[key]) for key in published)
    published["class_embed.1.bias"] = published["class_embed.1.bias"] + 1
    with pytest.raises(ValueError, match="repeats an entry with another value"):
        from_published(published)
    for name in ("class_embed.1.bias", "class_embed.1.weight"):
        del published[name], published[f"transformer.decoder.{name}"]
    for key in [key for key in published if "bbox_embed.1." in key]:
        del published[key]
    published = {key.replace("class_embed.0.", "class_embed.5."): value for key, value in published.items()}
    with pytest.raises(ValueError, match="2 layers, and heads for"):
        from_published(published)


@pytest.mark.parametrize("count", [5, 30])
def test_another_number_of_queries_is_taken_from_those_of_the_file(tmp_path, count):
    theirs = DINO(**{**TINY_SIZES, "num_classes": 2})
    torch.save({"model": to_published(theirs.state_dict())}, tmp_path / "published.pth")
    model = DINO(**{**TINY_SIZES, "num_classes": 2, "num_queries": count})
    report = str(load_weights(model, tmp_path / "published.pth"))
    old, new = (part.query_selection.content_queries.weight.detach() for part in (theirs, model))
    if count < len(old):
        assert torch.equal(new, old[:count]) and "Of its 12 queries the first 5 are taken" in report
        return
    assert torch.equal(new[: len(old)], old) and "Its 12 queries are repeated, with noise, to make 30" in report
    apart = (new[len(old) : 2 * len(old)] - old).abs()
    assert 0 < float(apart.max()) < float(old.std()) and not torch.equal(new[12:24], new[24:30].repeat(2, 1))


@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [
        ("dino_r50_4scale_2x_coco.pdparams", "backbone.conv1.weight", "PaddlePaddle"),
        ("model.safetensors", "model.encoder.weight", "safetensors"),
        ("pytorch_model.bin", "model.backbone.conv_encoder.model.conv1.weight", "transformers"),
        ("dino_resnet50_ep12.pth", "model.model.transformer.level_embed", "NVIDIA TAO"),
    ],
)
def test_weights_of_other_projects_are_refused_by_name(tmp_path, name, key, kind):
    torch.save({"state_dict": {key: torch.zeros(2)}}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"of {kind}.* not read; see `python -m dino_lightning weights`"):
        read_weights(tmp_path / name)


def test_a_class_map_names_the_class_to_start_from():
    options = {"weights": "w.pth", "weights_for_rooms": None, "class_map": {"door": "chair"}}
    assert detector_weights(options, ["room", "door"]) == ("w.pth", ["room", "chair"])
    with pytest.raises(
        ValueError, match="class_map names door, which is no class of the dataset; its classes are room"
    ):
        detector_weights(options, ["room"])
