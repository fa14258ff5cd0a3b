"""Milliseconds to detect, from the batch to boxes: `python -m benchmarks latency`.

The checkpoint's module and the forms that `export` writes, torchvision's Faster R-CNN, and rfdetr where it is
installed, all with random weights (or those of `--ckpt_path`) at the same size, in turns; on a CPU also the module with
its linear layers by MKL, as PyTorch computes them by itself, and with `--before DIR` the module of another commit. The
table ends with two times that a user gave for his own setting; they were not measured here.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.exported_forms import FORMS, SMALL_BATCH, agreement, export_forms
from benchmarks.measure import Timing, environment, interleaved, save, table
from benchmarks.other_commit import OtherCommit
from benchmarks.peers import rfdetr_base
from dino_lightning.export.exported_model import Run as Detect
from dino_lightning.inference.detector import load_module
from dino_lightning.structures import Batch
from dino_lightning.training.module import DINOModule

GIVEN = {"YOLO, as the user gave it": 600.0, "DINO, as the user expected it": 1500.0}  # milliseconds
TINY = {
    "backbone": "resnet10",
    "backbone_norm": "group",
    "num_feature_levels": 3,
    "hidden_dim": 32,
    "num_heads": 4,
    "ffn_dim": 48,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_queries": 20,
}
MODULES = {"module": "checkpoint", "mkl": "checkpoint, linear layers by MKL"}
BEFORE = "checkpoint, as of --before"
Run = Callable[[], object]


def contestants(
    module: DINOModule, images: Tensor, device: str, forms: list[str], exported: Mapping[str, Detect]
) -> dict[str, Run]:
    """The functions to time, by name, each for one batch of (B, 3, H, W) uint8 images.

    Args:
        module: on the device.
        images: on the host.
        device: of the module; exported forms compute on the CPU.
        forms: of `MODULES`, which of the module's are wanted.
        exported: of `export_forms`; those of one image are left out for several.
    """
    batch = Batch.from_images(list(images)).to(device)
    own = _synchronised(lambda: module(batch), device)
    runs: dict[str, Run] = {}
    if "module" in forms:
        runs[MODULES["module"]] = own
    if "mkl" in forms and device == "cpu":
        runs[MODULES["mkl"]] = patch("dino_lightning.model.linear._has_both", lambda: False)(own)
    sizes = torch.tensor([[int(side) for side in images.shape[2:]]] * len(images))
    prepared = module.model.normalize(batch.images).cpu().contiguous()
    for name, detect in exported.items():
        if name not in SMALL_BATCH:
            runs[name] = partial(detect, prepared, sizes, sizes)
        elif len(images) == 1:
            runs[name] = partial(detect, images)
    return runs


def _peers(images: Tensor, device: str) -> dict[str, Run]:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    # boxes of random weights all score low; without a threshold as many are kept as with trained ones
    network = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=min(images.shape[2:]),
        max_size=max(images.shape[2:]),
        box_score_thresh=0.0,
    )
    network = network.eval().to(device)
    floats = [image.float().div(255).to(device) for image in images]
    runs: dict[str, Run] = {"torchvision Faster R-CNN R50": _synchronised(lambda: network(floats), device)}
    if importlib.util.find_spec("rfdetr") is not None:
        runs |= _rfdetr(images, device)
    return runs


def _rfdetr(images: Tensor, device: str) -> dict[str, Run]:
    """RF-DETR at its own resolution, to which it resizes by itself."""
    from PIL import Image

    network = rfdetr_base(device)
    pages = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return {"rfdetr base": _synchronised(lambda: network.predict(pages, threshold=0.0), device)}


def _synchronised(run: Run, device: str) -> Run:
    def call() -> object:
        with torch.inference_mode():
            result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return call


def percentile(timing: Timing, percent: int) -> float:
    """Percentile of the rounds in milliseconds, interpolated linearly between two rounds."""
    return 1000 * statistics.quantiles(timing.seconds, n=100, method="inclusive")[percent - 1]


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks latency", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--ckpt_path", help="a checkpoint (DINO R50 4-scale, 80 classes, random weights)")
    add("--size", default="800x1066", help="height x width")
    add("--batch_sizes", default="1,4")
    add("--rounds", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    every = (*MODULES, *FORMS)
    usual = [form for form in every if not form.endswith("int8")]
    add("--forms", nargs="*", choices=every, default=usual, metavar="FORM", help=f"of {', '.join(every)}")
    add("--exports", type=Path, metavar="DIR", help="keeps the exported files, and takes those that are there")
    add("--int8", type=Path, metavar="FILE", help="an ONNX file of --precision int8; else made from drawn images")
    add("--before", type=Path, metavar="DIR", help="a checkout of another commit: its module has a process of its own")
    add("--peers", action=argparse.BooleanOptionalAction, default=True)
    add("--tiny", action="store_true", help="a tiny detector, to try the measurement")
    add("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    if options.int8 is not None and "int8" not in options.forms:
        options.forms.append("int8")
    height, width = (int(side) for side in options.size.split("x"))
    torch.manual_seed(0)  # so that files in --exports are those of these weights
    sizes: dict[str, Any] = TINY if options.tiny else {}
    if options.ckpt_path is None:
        module = DINOModule(num_classes=80, backbone_weights=None, **sizes)
    else:
        module = load_module(options.ckpt_path)
    module = module.eval()
    results: dict[str, Any] = {}
    rows = [("", "batch", "p50 ms", "p95 ms", "spread", "p50 for each image")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.exports or Path(temporary)
        exported = export_forms(module, (height, width), folder, options.forms, options.int8)
        same = agreement(module, (height, width), exported)
        module = module.to(options.device)
        for count in (int(number) for number in options.batch_sizes.split(",")):
            images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
            runs = contestants(module, images, options.device, options.forms, exported)
            if options.peers:
                runs |= _peers(images, options.device)
            other = None
            if options.before is not None:
                settings = {"num_classes": 80, "backbone_weights": None, **sizes}
                other = OtherCommit(options.before, settings, options.ckpt_path, images.shape, options.device)
                runs[BEFORE] = other.detect
            try:
                timings = interleaved(runs, rounds=options.rounds)
            finally:
                if other is not None:
                    other.close()
            for name, timing in timings.items():
                p50, p95 = percentile(timing, 50), percentile(timing, 95)
                results[f"{name}, batch {count}"] = {"p50_ms": p50, "p95_ms": p95, **timing.as_json()}
                spread = f"{timing.spread:.0%}"
                rows.append((name, str(count), f"{p50:.0f}", f"{p95:.0f}", spread, f"{p50 / count:.0f}"))
    rows += [(f"({name}, not measured)", "", f"{value:.0f}", "", "", "") for name, value in GIVEN.items()]
    threads = torch.get_num_threads()
    setting = f"{height} x {width} pixels, {options.device}, {threads} threads, {options.rounds} rounds in turns"
    print(f"{setting}\n\n{table(rows)}")
    if same:
        print(f"\n{table([('', 'detections', 'boxes differ by', 'scores by', 'queries exchanged'), *same])}")
    if options.output is not None:
        save(options.output, {"environment": environment(), "given_ms": GIVEN, "results": results})


if __name__ == "__main__":
    main()
