"""Matching and losses of a training step, forward and backward: `python -m benchmarks match`.

`Criterion` (all layers at once, one copy to the host) against the published way, layer by layer (`benchmarks.plain`).
Both must give the same loss and the same gradients, or there is no result.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import plain
from benchmarks.measure import environment, interleaved, save, table
from dino_lightning.losses import Criterion
from dino_lightning.structures import DenoisingOutput, ModelOutput, Targets, pad_targets

LAYERS, BATCH, QUERIES, CLASSES, NUM_DENOISING = 6, 4, 900, 80, 100
BOX_COUNTS = (10, 50, 100)


def example(count: int, device: str) -> tuple[ModelOutput, Targets]:
    """Random outputs with the shapes of an R50 4-scale model, for images of about `count` boxes."""
    generator = torch.Generator().manual_seed(count)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    counts = [max(1, count - 2 * index) for index in range(BATCH)]
    targets = pad_targets(
        [
            (torch.rand(n, 4, generator=generator) * 0.4 + 0.1, torch.randint(CLASSES, (n,), generator=generator))
            for n in counts
        ]
    ).to(device)
    groups = max(NUM_DENOISING // count, 1)
    slots = 2 * groups * count
    output = ModelOutput(
        pred_logits=(draw(LAYERS, BATCH, QUERIES, CLASSES) * 4 - 6).requires_grad_(),
        pred_boxes=(draw(LAYERS, BATCH, QUERIES, 4) * 0.4 + 0.1).requires_grad_(),
        encoder_logits=(draw(BATCH, QUERIES, CLASSES) * 4 - 6).requires_grad_(),
        encoder_boxes=(draw(BATCH, QUERIES, 4) * 0.4 + 0.1).requires_grad_(),
        denoising=DenoisingOutput(
            pred_logits=(draw(LAYERS, BATCH, slots, CLASSES) * 4 - 6).requires_grad_(),
            pred_boxes=(draw(LAYERS, BATCH, slots, 4) * 0.4 + 0.1).requires_grad_(),
            num_groups=groups,
            max_boxes=count,
        ),
    )
    return output, targets


def inputs(output: ModelOutput) -> list[Tensor]:
    """The tensors whose gradients are computed."""
    assert output.denoising is not None
    return [
        output.pred_logits,
        output.pred_boxes,
        output.encoder_logits,
        output.encoder_boxes,
        output.denoising.pred_logits,
        output.denoising.pred_boxes,
    ]


def ours(criterion: Criterion, output: ModelOutput, targets: Targets) -> tuple[Tensor, ...]:
    """The loss of `Criterion` and its gradients."""
    loss: Tensor = criterion(output, targets)["loss"]
    return (loss.detach(), *torch.autograd.grad(loss, inputs(output)))


def published(output: ModelOutput, targets: Targets) -> tuple[Tensor, ...]:
    """The loss computed layer by layer, and its gradients."""
    loss = plain.total_loss(output, targets)
    return (loss.detach(), *torch.autograd.grad(loss, inputs(output)))


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks match", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cpu"
    criterion = Criterion()
    rows = [("boxes per image", "published ms", "ours ms", "spread", "ratio", "loss differs by", "gradients by")]
    results = {}
    for count in tqdm(BOX_COUNTS, "box counts"):
        output, targets = example(count, device)
        one, other = published(output, targets), ours(criterion, output, targets)
        loss_off = float((one[0] - other[0]).abs() / one[0])
        gradient_off = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one[1:], other[1:], strict=True))
        if loss_off > 1e-5 or gradient_off > 1e-5:
            raise SystemExit(f"The two do not agree: loss by {loss_off:.1e}, gradients by {gradient_off:.1e}.")
        timings = interleaved(
            {"published": partial(published, output, targets), "ours": partial(ours, criterion, output, targets)},
            rounds=options.rounds,
        )
        ratio = timings["published"].median / timings["ours"].median
        results[count] = {
            "ratio": ratio,
            "loss off": loss_off,
            "gradients off": gradient_off,
            "seconds": {name: timing.as_json() for name, timing in timings.items()},
        }
        rows.append(
            (
                str(count),
                f"{timings['published'].median * 1e3:.1f}",
                f"{timings['ours'].median * 1e3:.1f}",
                f"{max(timing.spread for timing in timings.values()):.0%}",
                f"{ratio:.1f}x",
                f"{loss_off:.0e}",
                f"{gradient_off:.0e}",
            )
        )
    print(
        f"{LAYERS} layers + encoder + denoising, batch {BATCH}, {QUERIES} queries, {CLASSES} classes, "
        f"{options.threads} thread(s), {options.rounds} rounds, forward + backward\n"
    )
    print(table(rows))
    if options.output is not None:
        save(options.output, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
