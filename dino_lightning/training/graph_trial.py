"""A trial of CUDA graphs on a run's first batch: they are used where what they replay is what was computed before."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dino_lightning.console import shown
from dino_lightning.kernel_trial import allowed_to_wait
from dino_lightning.model import DINO
from dino_lightning.model.compiled_layers import CompiledLayers
from dino_lightning.structures import Batch, ModelOutput

PASSES = 3  # PyTorch computes the first as it is, records the second and replays from the third on
MOST_OFF = 0.05  # of the norm of a tensor: sums of atomics in bfloat16 are not the same twice
LEAST_NORM = 0.01  # of the largest in its group: below it, rounding is what there is


def trouble_with_graphs(model: DINO, layers: CompiledLayers, batch: Batch) -> str | None:
    """Run both directions several times on one batch; weights, statistics and draws of the run stay as they are.

    A failure on the way back cannot be helped later, in the middle of a step, so it has to show here.

    Args:
        model: whose layers are compiled with CUDA graphs; in training mode.
        layers: of it.
        batch: with targets.

    Returns:
        What is wrong, on one line; None if nothing is, or if the compiler has given up the graphs itself.

    Raises:
        torch.OutOfMemoryError: as a step without a trial would.
    """
    device = model.level_embedding.device
    devices = [device] if device.type == "cuda" else []

    def compared() -> str | None:
        with torch.random.fork_rng(devices), _evaluating(model.backbone, model.neck), torch.no_grad():
            levels = model.feature_maps(batch.images)
            prepared = model.prepare(batch, levels)
        # the compiler has other code for tokens without a gradient, as those of a frozen backbone
        trained = any(one.requires_grad for part in (model.backbone, model.neck) for one in part.parameters())
        levels = [level.detach().requires_grad_(trained) for level in levels]
        skipped = _skipped()
        passes = []
        for _ in range(PASSES):
            layers.begin_step()
            with torch.random.fork_rng(devices):
                output = model.detect(levels, prepared)
                groups = (_parts(output), _gradients(model, output))
                passes.append([[tensor.detach().clone() for tensor in group] for group in groups])
            del output, groups  # which the next pass writes to
            if not layers.cuda_graphs:  # the compiler has failed, and said so
                return None
        if _skipped() > skipped:
            return f"PyTorch left out {_skipped() - skipped} of them; TORCH_LOGS=cudagraphs says why"
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
            return None  # draws of a graph are others
        off = max(_off(expected, actual) for expected, actual in zip(passes[0], passes[-1], strict=True))
        return None if off < MOST_OFF else f"a replay is off by {off:.1%}"

    try:
        return allowed_to_wait(device.index or 0, compared) if device.type == "cuda" else compared()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a capture or a driver can raise
        return shown(" ".join(f"{type(error).__name__}: {error}".split()), 300)


def _parts(output: ModelOutput) -> list[Tensor]:
    return [output.pred_logits, output.pred_boxes]


def _gradients(model: DINO, output: ModelOutput) -> list[Tensor]:
    """Of all parameters behind the backbone, without touching their `grad`, nor hooks that send them elsewhere."""
    parameters = [one for part in (model.encoder, model.decoder) for one in part.parameters() if one.requires_grad]
    loss = torch.stack([part.float().square().mean() for part in _parts(output)]).sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [one for one in found if one is not None]


def _off(expected: list[Tensor], actual: list[Tensor]) -> float:
    """The largest norm of a difference by that of what is expected; infinite where something is not finite."""
    differences = [one - other for one, other in zip(actual, expected, strict=True)]
    off, whole = (torch.stack(torch._foreach_norm(tensors)) for tensors in (differences, expected))
    share = float((off / whole.clamp(min=LEAST_NORM * float(whole.max()))).max())
    return share if math.isfinite(share) else math.inf


def _skipped() -> int:
    """How many graphs PyTorch has left out in this process, which it says in a log at most."""
    from torch._dynamo.utils import counters  # here, since to import the compiler takes a second

    return int(counters["inductor"]["cudagraph_skips"])


@contextlib.contextmanager
def _evaluating(*parts: nn.Module) -> Iterator[None]:
    """Without an effect on running statistics."""
    before = {module: module.training for part in parts for module in part.modules()}
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
