"""PyTorch's global settings for the speed of a CUDA device, for the time of a training."""

from __future__ import annotations

from typing import Any, Literal, get_args

import lightning
import torch

from dino_lightning.console import say

MatmulPrecision = Literal["highest", "high", "medium"]
TF32_CAPABILITY = (8, 0)  # of the first devices that have TensorFloat-32


class DeviceSettings(lightning.Callback):
    """Sets on a CUDA device what PyTorch computes float32 products in and how cuDNN chooses; restores both at the end.

    Products: TensorFloat-32, which has the range of float32 and 10 bits of its fraction, in runs of precision 32-true;
    their convolutions compute in it anyway, by PyTorch's default. In mixed precision, what is left in float32 is left
    so on purpose. What the user has set in PyTorch before stays.

    Convolutions: cuDNN times its algorithms once for each size of images and takes the fastest. Only while it trains:
    the images of an evaluation may have many sizes.

    Args:
        float32_matmul_precision: as of `torch.set_float32_matmul_precision`; None for the rule above.
        benchmark: whether cuDNN may choose by time, as it should for images of one size alone.
    """

    def __init__(self, *, float32_matmul_precision: MatmulPrecision | None = None, benchmark: bool = False) -> None:
        assert float32_matmul_precision in (None, *get_args(MatmulPrecision))
        self.precision, self.benchmark = float32_matmul_precision, benchmark
        self._precision_before: str | None = None  # where it was changed
        self._benchmark_before: bool | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set what products are computed in, and say so once where the rule decides it."""
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return
        before, by_default = _current_precision(), str(trainer.precision) == "32-true"
        if before is None or (self.precision is None and not (by_default and before == "highest")):
            return
        if self.precision is None:
            if torch.cuda.get_device_capability(device) < TF32_CAPABILITY:
                return
            say(
                "Float32 products are computed in TensorFloat-32, as convolutions are "
                "(--float32_matmul_precision highest: in float32)."
            )
        self._precision_before = before
        torch.set_float32_matmul_precision(self.precision or "high")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Let cuDNN choose by time from the first step on."""
        reproducible = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
        if self.benchmark and not reproducible and trainer.strategy.root_device.type == "cuda":
            self._benchmark_before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = True

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Not while it evaluates."""
        if self._benchmark_before is not None:
            torch.backends.cudnn.benchmark = self._benchmark_before

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Continue with it."""
        if self._benchmark_before is not None:
            torch.backends.cudnn.benchmark = True

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restore both."""
        if self._precision_before is not None:
            torch.set_float32_matmul_precision(self._precision_before)
        if self._benchmark_before is not None:
            torch.backends.cudnn.benchmark = self._benchmark_before
        self._precision_before = self._benchmark_before = None

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Restore both, of a run that fails or is stopped, too."""
        self.on_fit_end(trainer, pl_module)


def may_benchmark(options: Any) -> bool:
    """Whether cuDNN may choose by time: all training images have one size, and the user has decided nothing else.

    Args:
        options: of `fit`, as parsed.
    """
    given = options.trainer.get("benchmark") is not None or options.trainer.get("deterministic") is not None
    return options.data.get("fixed_size") is not None and not given


def _current_precision() -> str | None:
    """What is set, by the names of `torch.set_float32_matmul_precision`; None where it was set in another way."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch.backends...fp32_precision, which torch 2.9 has beside it
        return None
