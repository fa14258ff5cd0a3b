"""Two processes compared with one, on the CPU over gloo or on GPUs over NCCL: `python -m benchmarks ddp`.

Steps of a small detector on the same number of images for each process. On a CPU the processes share cores and memory,
each with one thread, so the ratio shows what the exchange of gradients costs, not how training scales.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import environment, save, table
from benchmarks.peers import CLASSES, random_batch
from dino_lightning.losses import Criterion
from dino_lightning.model import DINO

SIZES: dict[str, Any] = {"backbone": "resnet18", "num_encoder_layers": 2, "num_decoder_layers": 2, "num_queries": 100}


def worker(rank: int, processes: int, options: argparse.Namespace, results: Any) -> None:
    """Train on one process; the first one reports the median seconds of a step."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options.port))
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device = f"cuda:{rank}" if gpu else "cpu"
    dist.init_process_group("nccl" if gpu else "gloo", rank=rank, world_size=processes)
    torch.manual_seed(0)
    model = DINO(num_classes=CLASSES, **SIZES).train().to(device)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if options.compress_gradients:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    criterion = Criterion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = random_batch(options.side, options.side, options.batch_size, device)
    seconds = []
    for number in range(options.steps + 1):
        start = time.perf_counter()
        criterion(wrapped(batch), batch.targets)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()
        if number > 0:
            seconds.append(time.perf_counter() - start)
    if rank == 0:
        results.append(statistics.median(seconds))
    dist.destroy_process_group()


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ddp", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--side", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--batch_size", type=int, default=2, help="of each process")
    parser.add_argument("--steps", type=int, default=5, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compress_gradients", action="store_true")
    parser.add_argument("--port", type=int, default=29531)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], options.processes: []}
    with mp.Manager() as manager:
        for _ in range(options.rounds):
            for processes, values in seconds.items():
                results = manager.list()
                mp.spawn(worker, (processes, options, results), nprocs=processes)
                values.append(results[0])
    one, many = (statistics.median(values) for values in seconds.values())
    efficiency = one / many
    rows = [("processes", "seconds/step", "images/s", "efficiency")]
    for processes, median in ((1, one), (options.processes, many)):
        images = processes * options.batch_size / median
        rows.append((str(processes), f"{median:.3f}", f"{images:.2f}", f"{one / median:.0%}"))
    print(table(rows))
    if options.output is not None:
        numbers = {"efficiency": efficiency, "seconds": {str(key): values for key, values in seconds.items()}}
        save(options.output, {"environment": environment(), "results": numbers})


if __name__ == "__main__":
    main()
