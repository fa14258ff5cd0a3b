"""Layers compiled by `torch.compile`, which run as they are where the compiler fails."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import _StopRecomputationError

from dino_lightning.console import shown

Backend = str | Callable[..., Any]  # of `torch.compile`
MOST_GRAPHS = 64  # of a class of layers


class CompiledLayers:
    """Layers that are compiled at their first use in training; names of parameters stay as they are.

    In evaluation, where it would take as many graphs again, and in exports the layers run as they are.

    A compiler can fail on a machine for many reasons: no C compiler, no headers of Python, a full disk, an operator
    that it does not know. All layers run as they are from then on, and one warning says why.

    Args:
        layers: to compile, each for itself; layers of one class share their graphs.
        backend: of `torch.compile`.

    Attributes:
        trouble: what the compiler said when it failed, on one line; None while it has not.
    """

    def __init__(self, layers: Sequence[nn.Module], backend: Backend = "inductor") -> None:
        self.trouble: str | None = None
        self._layers = tuple(layers)
        for layer in self._layers:
            layer.compile(backend=backend)
            layer._compiled_call_impl = _Guarded(self, layer)

    def give_up(self, error: Exception) -> None:
        """Leave all layers as they are from now on.

        Args:
            error: of the compiler.
        """
        for layer in self._layers:
            layer._compiled_call_impl = None
        if self.trouble is None:
            self.trouble = shown(" ".join(f"{type(error).__name__}: {error}".split()), 300)
            warnings.warn(
                f"The layers of encoder and decoder run without being compiled, since that failed ({self.trouble}).",
                stacklevel=2,
            )


class _Guarded:
    """A call of a layer: the compiled one in training, or the layer's own where that fails."""

    def __init__(self, group: CompiledLayers, layer: nn.Module) -> None:
        self.group, self.layer, self.compiled = group, layer, layer._compiled_call_impl
        assert self.compiled is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        as_it_is: Callable[..., Any] = self.layer._call_impl
        if not self.layer.training or torch.compiler.is_compiling():
            return as_it_is(*args, **kwargs)
        try:
            with _settings():
                return self.compiled(*args, **kwargs)  # type: ignore[misc]
        except (torch.OutOfMemoryError, _StopRecomputationError):  # the latter ends what `checkpoint` computes again
            raise
        except Exception as error:  # whatever a compiler can raise
            out = as_it_is(*args, **kwargs)  # what this raises is no fault of the compiler
            self.group.give_up(error)
            return out


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """The compiler's settings for these layers.

    - The way back is compiled together with the way forward, where a failure can still be helped. PyTorch would leave
      it to the first backward pass; versions without this setting still do.
    - Graphs with and without padding, of one image and of more, for fixed and for other sizes, are more than the eight
      after which PyTorch runs the rest as it is without a word.
    """
    from torch._dynamo import config as compiler  # here, since to import the compiler takes a second
    from torch._functorch import config as autograd

    limit = "recompile_limit" if hasattr(compiler, "recompile_limit") else "cache_size_limit"  # the older name
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiler.patch({limit: MOST_GRAPHS}))
        if hasattr(autograd, "force_non_lazy_backward_lowering"):
            stack.enter_context(autograd.patch(force_non_lazy_backward_lowering=True))
        yield
