"""Images per second of `predict` as a share of what its model alone does: `python -m benchmarks predict`.

The model alone: the same weights, precision, batch size, views and threads, one batch after another, on images that lie
in memory decoded and resized, to detections above the threshold. `predict` reads, resizes, detects, draws and writes
files from and to a folder; its seconds are those that it says itself, without loading the model. In turns, with and
without pictures, on drawn plans as PNG and as JPEG files. On a CPU all of this is done by the same cores, so it also
says what share the processor time allows: cores times the seconds of the model alone, by the processor seconds of
everything.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from PIL import Image
from torch import Tensor

from benchmarks.ladder import RUNGS, settings_of
from benchmarks.measure import environment, save, table
from dino_lightning.data.image_files import available_cores
from dino_lightning.data.images import read_image
from dino_lightning.data.transforms import LabelledImage
from dino_lightning.detections import Detections, save_page
from dino_lightning.floor_plans import write_rooms_dataset
from dino_lightning.inference.detector import load_module
from dino_lightning.inference.loop import OVERLAY_SIDE
from dino_lightning.inference.predict_folder import PredictOptions, predict_folder
from dino_lightning.structures import Batch
from dino_lightning.training.module import DINOModule
from dino_lightning.training.option_checks import TTA_VIEWS
from dino_lightning.weights.reading import find_model

ALONE = "the model alone"
COSTED = 20  # images of which processor time is taken


def plans_of(folder: Path, count: int, size: int | None) -> dict[str, Path]:
    """The folders of drawn plans, as JPEG and as PNG files; drawn unless they are there."""
    if not (folder / "png").is_dir():
        drawn = write_rooms_dataset(folder / "drawn", num_train=count, num_val=1, style="realistic", size=size)
        pages = sorted((drawn / "train" / "images").iterdir())
        for suffix in ("jpg", "png"):
            plans_as(folder, suffix, pages)
    return {suffix: folder / suffix for suffix in ("jpg", "png")}


def plans_as(folder: Path, suffix: str, pages: Sequence[Path]) -> Path:
    """A folder with the same pages, all as PNG or all as JPEG files."""
    made = folder / suffix
    made.mkdir()
    for page in pages:
        with Image.open(page) as image:
            image.convert("RGB").save(made / f"{page.stem}.{suffix}", quality=90)
    return made


def in_memory(module: DINOModule, paths: Iterable[Path]) -> list[tuple[Tensor, tuple[int, int]]]:
    """Each image as the model sees it, (3, h, w) uint8, and the (height, width) of its file."""
    transform, images = module.eval_transform(), []
    for path in paths:
        pixels = read_image(path)
        labelled = LabelledImage(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        images.append((transform(labelled).image.contiguous(), (int(pixels.shape[1]), int(pixels.shape[2]))))
    return images


@torch.no_grad()
def rate_alone(module: DINOModule, images: Sequence[tuple[Tensor, tuple[int, int]]], batch_size: int) -> float:
    """Images per second of the model alone; batches are of one shape, as in `predict`."""
    by_shape: dict[tuple[int, ...], list[tuple[Tensor, tuple[int, int]]]] = {}
    for image in images:
        by_shape.setdefault(tuple(image[0].shape), []).append(image)
    groups = [
        group[first : first + batch_size] for group in by_shape.values() for first in range(0, len(group), batch_size)
    ]
    start = time.perf_counter()
    for group in groups:
        batch = Batch.from_images([pixels for pixels, _ in group], original_sizes=[size for _, size in group])
        for detections in module.detect_batch(batch.to(module.device)):
            detections.cpu().above(module.score_threshold)
    return len(images) / (time.perf_counter() - start)


def processor_seconds(call: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Of one call, on one thread; the mean over the items of the faster of two rounds."""
    rounds = []
    for _ in range(2):
        start = time.thread_time()
        for item in items:
            call(item)
        rounds.append((time.thread_time() - start) / len(items))
    return min(rounds)


def costs(module: DINOModule, folder: Path, written: Path) -> dict[str, float]:
    """Processor seconds of an image: `read`, decoded and resized; `picture`, drawn and written as the same kind."""
    paths, transform = sorted(folder.iterdir())[:COSTED], module.eval_transform()

    def read(path: Path) -> Tensor:
        pixels = read_image(path)
        transform(LabelledImage(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))
        return pixels

    def picture(drawn: tuple[Detections, Tensor]) -> None:
        save_page(drawn[0].draw(drawn[1], long_side=OVERLAY_SIDE), written / f"page{paths[0].suffix}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reading = processor_seconds(read, paths)
        found = [(detections_in(module, path), read_image(path)) for path in paths]
        return {"read": reading, "picture": processor_seconds(picture, found)}
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def detections_in(module: DINOModule, path: Path) -> Detections:
    """What `predict` draws on an image."""
    ((pixels, size),) = in_memory(module, [path])
    (found,) = module.detect_batch(Batch.from_images([pixels], original_sizes=[size]).to(module.device))
    detections: Detections = found.cpu().above(module.score_threshold)
    return detections


def random_checkpoint(config: str, tiny: bool, path: Path) -> Path:
    """A checkpoint of a configuration's detector with random weights, which finds next to nothing."""
    settings = settings_of(config, tiny)
    side = settings["data"]["fixed_size"]
    sizes = {"stretch_to": side, "image_size": side, "max_size": side}
    arguments = {**settings["model"], **sizes, "num_classes": 1, "class_names": ["room"]}
    state = DINOModule(**arguments).state_dict()
    version = {"pytorch-lightning_version": lightning.__version__, "epoch": 0, "global_step": 1}
    torch.save({"state_dict": state, "hyper_parameters": arguments, **version}, path)
    return path


def rate_of_predict(checkpoint: Path, images: Path, output: Path, options: argparse.Namespace, pictures: bool) -> float:
    """Images per second of `predict`, from its own clock."""
    wanted = PredictOptions(
        images=[str(images)],
        output=output,
        overwrite=True,
        overlays=pictures,
        tta_views=options.tta_views,
        accelerator=options.device,
        devices="1",
        precision="32-true",
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    summary = predict_folder(checkpoint, wanted)
    assert summary is not None and not summary.failed
    return summary.done_now / summary.seconds


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks predict", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_path", default="rooms_small", help="a checkpoint, or rooms_small")
    parser.add_argument("--images", type=int, default=500, help="drawn plans (500)")
    parser.add_argument("--config", choices=RUNGS, help="its detector with random weights, instead of a checkpoint")
    parser.add_argument("--tiny", action="store_true", help="at tiny sizes, to try the measurement")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="keeps the plans, and takes those that are there")
    parser.add_argument("--size", type=int, help="long side of the plans in pixels (of many sizes)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_workers", type=int, help="processes that read images (as predict chooses)")
    parser.add_argument("--tta_views", type=int, choices=TTA_VIEWS, help="ways to see an image (as the model has it)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.config is None:
            checkpoint = find_model(options.ckpt_path)
        else:
            checkpoint = random_checkpoint(options.config, options.tiny, folder / "random.ckpt")
        module = load_module(checkpoint).to(options.device)
        if options.tta_views is not None:
            module.hparams["tta_views"] = options.tta_views
        folders = plans_of(options.plans or folder / "plans", options.images, options.size)
        images = in_memory(module, sorted(folders["png"].iterdir()))
        cost = {suffix: costs(module, plans, folder) for suffix, plans in folders.items()}
        rate_alone(module, images[:8], options.batch_size)
        rates: dict[str, list[float]] = {ALONE: []}
        used: list[float] = []  # processor seconds of an image by the model alone
        for _ in range(options.rounds):
            start = time.process_time()
            rates[ALONE].append(rate_alone(module, images, options.batch_size))
            used.append((time.process_time() - start) / len(images))
            for suffix, plans in folders.items():
                for pictures in (False, True):
                    case = f"predict, {suffix.upper()}, {'with' if pictures else 'without'} pictures"
                    rate = rate_of_predict(checkpoint, plans, folder / "found", options, pictures)
                    rates.setdefault(case, []).append(rate)
    results: dict[str, Any] = {"processor_seconds": {**cost, ALONE: statistics.median(used)}}
    rows = [("", "images/s", "of the model alone", "spread", "processor ms", "allows")]
    alone = statistics.median(1 / rate for rate in rates[ALONE])
    for case, values in rates.items():
        spent, allowed = f"{1000 * statistics.median(used):.1f}", ""
        if case != ALONE:
            found = cost["jpg" if "JPG" in case else "png"]
            more = found["read"] + (found["picture"] if case.endswith("with pictures") else 0)
            spent = f"+ {1000 * more:.1f}"
            allowed = f"{available_cores() * alone / (statistics.median(used) + more):.0%}"
        shares = [value / alone for value, alone in zip(values, rates[ALONE], strict=True)]
        share, middle = statistics.median(shares), statistics.median(values)
        results[case] = {"images_per_second": middle, "share": share, "rounds": values}
        rows.append((case, f"{middle:.1f}", f"{share:.0%}", f"{min(shares):.0%} to {max(shares):.0%}", spent, allowed))
    print(
        f"{len(images)} plans, {options.device}, {torch.get_num_threads()} threads, "
        f"batches of {options.batch_size}, {module.hparams['tta_views']} views, {options.rounds} rounds in turns\n\n"
        f"{table(rows)}"
    )
    if options.output is not None:
        save(options.output, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
