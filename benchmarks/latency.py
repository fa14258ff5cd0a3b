"""Milliseconds to detect, from the prepared batch to boxes: `python -m benchmarks latency`.

The checkpoint's module, its ONNX file in onnxruntime, torchvision's Faster R-CNN, and rfdetr where it is installed, all
with random weights (or those of `--ckpt_path`) at the same size, in turns. The table ends with two times that a user
gave for his own setting; they were not measured here.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Timing, environment, interleaved, save, table
from benchmarks.peers import rfdetr_base
from dino_lightning.export.formats import describe_module, run_onnx, write_onnx
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
Run = Callable[[], object]


def contestants(module: DINOModule, images: Tensor, device: str, peers: bool, onnx: Path | None) -> dict[str, Run]:
    """The functions to time, by name, each for one batch of (B, 3, H, W) uint8 images."""
    size = (int(images.shape[2]), int(images.shape[3]))
    batch = Batch.from_images(list(images)).to(device)
    runs: dict[str, Run] = {"checkpoint": _synchronised(lambda: module(batch), device)}
    if onnx is not None:
        detect = run_onnx(onnx)
        sizes = torch.tensor([size] * len(images))
        prepared = module.model.normalize(batch.images).cpu().contiguous()
        runs["ONNX, onnxruntime on the CPU"] = lambda: detect(prepared, sizes, sizes)
    if peers:
        runs |= _peers(images, device)
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks latency", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_path", help="a checkpoint (DINO R50 4-scale, 80 classes, random weights)")
    parser.add_argument("--size", default="800x1066", help="height x width")
    parser.add_argument("--batch_sizes", default="1,4")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True, help="export, and time that too")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny detector, to try the measurement")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))
    sizes: dict[str, Any] = TINY if options.tiny else {}
    if options.ckpt_path is None:
        module = DINOModule(num_classes=80, backbone_weights=None, **sizes)
    else:
        module = load_module(options.ckpt_path)
    module = module.eval()
    results: dict[str, Any] = {}
    rows = [("", "batch", "p50 ms", "p95 ms", "p50 for each image")]
    with tempfile.TemporaryDirectory() as folder:
        onnx = None
        if options.onnx:
            onnx = Path(folder) / "model.onnx"
            write_onnx(module, onnx, describe_module(module, "outside"))
        module = module.to(options.device)
        for count in (int(number) for number in options.batch_sizes.split(",")):
            images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
            runs = contestants(module, images, options.device, options.peers, onnx)
            for name, timing in interleaved(runs, rounds=options.rounds).items():
                p50, p95 = percentile(timing, 50), percentile(timing, 95)
                results[f"{name}, batch {count}"] = {"p50_ms": p50, "p95_ms": p95, **timing.as_json()}
                rows.append((name, str(count), f"{p50:.0f}", f"{p95:.0f}", f"{p50 / count:.0f}"))
    rows += [(f"({name}, not measured)", "", f"{value:.0f}", "", "") for name, value in GIVEN.items()]
    print(f"{height} x {width} pixels, {options.device}, {options.rounds} rounds in turns\n\n{table(rows)}")
    if options.output is not None:
        save(options.output, {"environment": environment(), "given_ms": GIVEN, "results": results})


if __name__ == "__main__":
    main()
