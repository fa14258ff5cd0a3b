"""The configurations from fast to accurate, in one table: `python -m benchmarks ladder [--train_minutes 5]`.

For each rung of the ladder and two of torchvision's detectors: parameters, multiply-accumulate operations (GMAC), the
milliseconds of one image at the configuration's size, by the module, its ONNX file in onnxruntime and in OpenVINO, all
in turns; and with `--train_minutes` AP50 and F1 on drawn floor plans after the same CPU minutes of training. All start
from random weights, and their backbones' batch norms train; one row more starts from the packaged weights rooms_small.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.latency import TINY, percentile
from benchmarks.measure import environment, interleaved, save, table
from benchmarks.race import race
from benchmarks.torchvision_detectors import faster_rcnn, ssdlite
from dino_lightning.cli.config_files import config_path
from dino_lightning.export.fewer_bits import write_int8
from dino_lightning.export.formats import describe_module, run_onnx, write_onnx
from dino_lightning.files import atomic_write
from dino_lightning.floor_plans import write_rooms_dataset
from dino_lightning.model.backbone import Backbone
from dino_lightning.structures import Batch
from dino_lightning.training.module import DINOModule

RUNGS = ("small_cpu", "dino_s", "dino_m", "dino_l", "dino_x")  # configurations
PACKAGED = "small_cpu from rooms_small"
PEERS = {"ssdlite": ssdlite, "faster_rcnn": faster_rcnn}  # with the backbone, sizes and data of small_cpu
NAMES = (*RUNGS, PACKAGED, *PEERS)
NUM_CLASSES = 5  # while milliseconds are measured
TINY_SIDE = 96
CALIBRATION_IMAGES = 2  # of noise, for int8: what the ranges are matters to accuracy, not to time
TIMED = ("module", "ONNX", "OpenVINO", "int8")
NOT_MEASURED = "-"
Run = Callable[[], object]


def settings_of(name: str, tiny: bool) -> dict[str, Any]:
    """The configuration of a contestant; its weights are left out, and its sizes tiny if asked for."""
    file = name if name in RUNGS else "small_cpu"
    settings: dict[str, Any] = yaml.safe_load(config_path(f"{file}.yaml").read_text(encoding="utf-8"))
    if tiny:
        settings["model"] |= TINY | {"trainable_backbone_layers": 5}
        settings["data"]["fixed_size"] = TINY_SIDE
    settings["model"] |= {"weights": None, "weights_for_rooms": None, "backbone_weights": None}
    return settings


def for_random_weights(settings: dict[str, Any]) -> dict[str, Any]:
    """The same for training from random weights: all of the backbone trains, at the rate of the rest."""
    model = settings["model"]
    changes = {"backbone_norm": "batch", "trainable_backbone_layers": 5, "backbone_lr": model["lr"]}
    return settings | {"model": model | changes}


def detector_of(name: str, settings: dict[str, Any]) -> nn.Module:
    """The network of a contestant with random weights, in evaluation mode."""
    if name in PEERS:
        model, side = settings["model"], int(settings["data"]["fixed_size"])
        peer = PEERS[name](Backbone(name=model["backbone"]), NUM_CLASSES, side).eval()
        # boxes of random weights all score low; without a threshold as many are kept as with trained ones
        for part in peer.modules():
            if hasattr(part, "score_thresh"):
                part.score_thresh = 0.0
        return peer
    return DINOModule(num_classes=NUM_CLASSES, **settings["model"]).eval()


def module_run(network: nn.Module, image: Tensor) -> Run:
    """A function that detects in a (3, H, W) uint8 image, by PyTorch."""
    given: Any = Batch.from_images([image]) if isinstance(network, DINOModule) else [image.float() / 255]

    def call() -> object:
        with torch.inference_mode():
            return network(given)

    return call


def _flop_of_linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0]


def _also_counted() -> dict[Any, Any]:
    """What the counter does not know by itself: oneDNN's products, see `dino_lightning.model.linear`."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return {torch.ops.mkldnn._linear_pointwise: _flop_of_linear} if known else {}


def gmac(run: Run) -> float:
    """Billions of multiply-accumulate operations of a call: products and convolutions, half of what is counted as FLOP.

    Sampling, norms and activations do not count.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not look into fused attention
    try:
        with FlopCounterMode(display=False, custom_mapping=_also_counted()) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops()) / 2e9


def exported(module: DINOModule, file: Path) -> Path:
    """Write the ONNX file unless it is there."""
    if not file.exists():
        write_onnx(module, file, describe_module(module, "outside"))
    return file


def in_int8(file: Path, source: Path, module: DINOModule, image: Tensor) -> Path:
    """Write an ONNX file in 8 bits as `export --precision int8` makes it, unless it is there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = (torch.randint_like(image, 0, 256) for _ in range(CALIBRATION_IMAGES))
        with atomic_write(file) as temporary:
            write_int8(source, temporary, (_inputs(module, pixels) for pixels in noise))
    return file


def onnx_run(file: Path, module: DINOModule, image: Tensor) -> Run:
    """A function that detects in the image, by onnxruntime on as many threads as PyTorch has."""
    detect, inputs = run_onnx(file), _inputs(module, image)
    return lambda: detect(*inputs)


def openvino_run(file: Path, module: DINOModule, image: Tensor) -> Run:
    """The same by OpenVINO, at this size, and in float32: by itself it takes bfloat16 where the CPU has it."""
    import openvino

    inputs = [value.contiguous().numpy() for value in _inputs(module, image)]
    model = openvino.convert_model(file) if file.suffix == ".onnx" else openvino.Core().read_model(file)
    model.reshape({entry.any_name: list(value.shape) for entry, value in zip(model.inputs, inputs, strict=True)})
    hints = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.compile_model(model, "CPU", hints)
    request = compiled.create_infer_request()
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)


def _inputs(module: DINOModule, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.tensor([image.shape[1:]])
    return module.model.normalize(image[None]).contiguous(), size, size.clone()


def runs_of(
    name: str, options: argparse.Namespace, folder: Path, results: dict[str, dict[str, Any]]
) -> dict[tuple[str, str], Run]:
    """What is timed of a contestant, by (name, form); notes its size, parameters and GMAC in the results."""
    settings = settings_of(name, options.tiny)
    side = int(settings["data"]["fixed_size"])
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    network = detector_of(name, settings)
    runs = {(name, "module"): module_run(network, image)}
    count = sum(parameter.numel() for parameter in network.parameters())
    # counted on a network of its own: what is kept between calls would stay from the other way to compute attention
    counted = gmac(module_run(detector_of(name, settings).requires_grad_(False), image))
    results[name] |= {"size": side, "parameters": count, "gmac": counted}
    if isinstance(network, DINOModule):
        file = exported(network, folder / f"{name}.onnx")
        runs[name, "ONNX"] = onnx_run(file, network, image)
        if importlib.util.find_spec("openvino") is not None:
            runs[name, "OpenVINO"] = openvino_run(file, network, image)
        if options.make_int8:
            in_int8(options.int8 / f"{name}.onnx", file, network, image)
        for ending, opened in ((".onnx", onnx_run), (".xml", openvino_run)):
            given = None if options.int8 is None else options.int8 / f"{name}{ending}"
            if given is not None and given.exists():
                runs[name, "int8"] = opened(given, network, image)
    return runs


def measure_latency(names: list[str], options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Milliseconds of every form of the contestants, timed in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.exports or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs: dict[tuple[str, str], Run] = {}
        for name in names:
            if name != PACKAGED:  # the detector of small_cpu
                runs |= runs_of(name, options, folder, results)
        if not options.rounds:  # only the files, and what is counted
            return
        keys = {f"{name}, {form}": (name, form) for name, form in runs}
        timings = interleaved({key: runs[found] for key, found in keys.items()}, rounds=options.rounds)
    for key, timing in timings.items():
        name, form = keys[key]
        p50, p95 = percentile(timing, 50), percentile(timing, 95)
        results[name].setdefault("ms", {})[form] = {"p50": p50, "p95": p95, **timing.as_json()}


def train(name: str, seed: int, data: Path, options: argparse.Namespace) -> dict[str, float]:
    """Minutes, steps and metrics of a contestant at the end of its training."""
    settings = settings_of(name, options.tiny)
    packaged = name == PACKAGED
    moments = race(
        name if name in PEERS else "ours",
        argparse.Namespace(
            settings=settings if packaged else for_random_weights(settings),
            weights_for_rooms="rooms_small" if packaged else None,
            weights=None,
            backbone_weights=None,
            data=data,
            minutes=options.train_minutes,
            clock="cpu",
            seed=seed,
            evaluations=1,
            tta_views=1,
        ),
    )
    last = moments[-1]
    return {"minutes": last.minutes, "steps": last.step, **last.values}


def mean_and_range(values: list[float], digits: int) -> str:
    """The mean of the seeds, and of several the smallest and the largest: "0.433 (0.200 to 0.600)"."""
    if not values:
        return NOT_MEASURED
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def shown(results: dict[str, dict[str, Any]]) -> str:
    """The results as a table, one row for each contestant; mean and range where there are several seeds."""
    rows: list[tuple[str, ...]] = [
        ("", "size", "M parameters", "GMAC", *(f"{form} ms" for form in TIMED), "minutes", "steps", "AP50", "F1")
    ]
    for name, found in results.items():
        sizes = (NOT_MEASURED,) * 3
        if "size" in found:
            sizes = (str(found["size"]), f"{found['parameters'] / 1e6:.1f}", f"{found['gmac']:.1f}")
        times = (f"{found['ms'][form]['p50']:.0f}" if form in found.get("ms", {}) else NOT_MEASURED for form in TIMED)
        seeds = list(found.get("trained", {}).values())
        metrics = (
            mean_and_range([seed[key] for seed in seeds], digits)
            for key, digits in (("minutes", 1), ("steps", 0), ("AP50", 3), ("F1", 3))
        )
        rows.append((name, *sizes, *times, *metrics))
    return table(rows)


def main() -> None:
    """Measure, and print the table; `--output` keeps the numbers, and takes up those that are there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ladder", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}")
    add("--latency", action=argparse.BooleanOptionalAction, default=True, help="measure milliseconds")
    add("--rounds", type=int, default=15, help="of the milliseconds; 0 only writes the files")
    add("--exports", type=Path, metavar="DIR", help="keeps the ONNX files, and takes those that are there")
    add("--int8", type=Path, metavar="DIR", help="NAME.onnx or NAME.xml in it, of lower precision, are timed as well")
    add("--make_int8", "--make-int8", action="store_true", help="write those that are missing in --int8, as ONNX files")
    add("--train_minutes", "--train-minutes", type=float, default=0.0, help="CPU minutes of training; 0 for none")
    add("--seeds", type=int, default=1, help="how many trainings; the mean and the range are shown")
    add("--first_seed", "--first-seed", type=int, default=0, help="the others follow it")
    add("--data", type=Path, help="a dataset (180 `realistic` drawn plans to train on and 40 held out, seed 20)")
    add("--tiny", action="store_true", help="tiny detectors, to try the measurement")
    add("--output", type=Path, help="write the numbers to this JSON file, beside those of other contestants in it")
    options = parser.parse_args()
    if not options.latency and options.train_minutes <= 0:
        parser.error("nothing to measure: give --train_minutes, or leave out --no-latency")
    if options.make_int8 and options.int8 is None:
        parser.error("--make_int8 needs --int8 DIR, the folder for the files")
    found: dict[str, dict[str, Any]] = {}
    if options.output is not None and options.output.exists():
        found = json.loads(options.output.read_text(encoding="utf-8"))["results"]
    results = {name: found.get(name, {}) for name in NAMES if name in found or name in options.only}

    def keep() -> None:
        if options.output is not None:
            save(options.output, {"environment": environment(), "results": results})

    if options.latency:
        measure_latency(options.only, options, results)
        keep()
    with tempfile.TemporaryDirectory() as temporary:
        data = options.data
        if options.train_minutes > 0 and data is None:
            data = write_rooms_dataset(Path(temporary) / "plans", num_train=180, num_val=40, style="realistic", seed=20)
        for name in options.only if options.train_minutes > 0 else ():
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                print(f"{name}, seed {seed}", flush=True)
                results[name].setdefault("trained", {})[str(seed)] = train(name, seed, data, options)
                keep()
    print(f"\n{torch.get_num_threads()} threads, one image\n\n{shown(results)}")


if __name__ == "__main__":
    main()
