"""Layers compiled by `torch.compile`, which run as they are where the compiler fails."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import _StopRecomputationError

from dino_lightning.console import shown

Backend = str | Callable[..., Any]  # of `torch.compile`
MOST_GRAPHS = 64  # of a class of layers
# of `torch.compile`, for CUDA graphs: not the mode `reduce-overhead`, which may come to mean more than that
GRAPHED: Mapping[str, Any] = {"backend": "inductor", "options": {"triton.cudagraphs": True}}


class CompiledLayers:
    """Layers that are compiled at their first use in training; names of parameters stay as they are.

    In evaluation, where it would take as many graphs again, and in exports the layers run as they are.

    A compiler can fail on a machine for many reasons: no C compiler, no headers of Python, a full disk, an operator
    that it does not know. All layers run as they are from then on, and one warning says why. Where CUDA graphs fail,
    the layers stay compiled, without them.

    With CUDA graphs, what a layer returns lies in memory that the next step writes to. So a training loop says
    `begin_step` before each forward pass and `keep_gradients` after each backward pass, and looks at nothing else that
    a layer returned in an earlier step.

    Args:
        layers: to compile, each for itself; layers of one class share their graphs.
        backend: of `torch.compile`.
        cuda_graphs: record what the compiler has made as CUDA graphs and replay them.
        parameters: whose gradients may lie in the memory of graphs, beside those of the layers; for `keep_gradients`.

    Attributes:
        trouble: what the compiler said when it failed, on one line; None while it has not.
        cuda_graphs: whether CUDA graphs are in use, or will be.
        trouble_with_graphs: why they are not, where they were asked for; None while they are.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        backend: Backend = "inductor",
        *,
        cuda_graphs: bool = False,
        parameters: Sequence[nn.Parameter] = (),
    ) -> None:
        self.trouble: str | None = None
        self.cuda_graphs = cuda_graphs
        self.trouble_with_graphs: str | None = None
        self._layers, self._backend = tuple(layers), backend
        self._parameters = dict.fromkeys((*parameters, *(one for layer in layers for one in layer.parameters())))
        self._gradients: dict[nn.Parameter, Tensor] = {}  # in memory of their own
        self._compile(**(GRAPHED if cuda_graphs else {"backend": backend}))

    def _compile(self, **options: Any) -> None:
        for layer in self._layers:
            layer.compile(**options)
            layer._compiled_call_impl = _Guarded(self, layer)

    def begin_step(self) -> None:
        """Say that nothing of the last step is needed any more: its memory may be written to."""
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch has no types here

    def keep_gradients(self) -> None:
        """Copy gradients that a CUDA graph has written to memory that it does not write to again, by one operation.

        PyTorch takes the gradient that a graph returns as `grad` itself, rather than a copy of it: summed over several
        batches, it would be overwritten by the second one (https://github.com/pytorch/pytorch/issues/169545).
        """
        if not self.cuda_graphs:
            return
        new = {one: one.grad for one in self._parameters if one.grad is not None}
        new = {one: grad for one, grad in new.items() if grad is not self._gradients.get(one)}
        if not new:
            return
        for one, grad in new.items():
            if one not in self._gradients:
                self._gradients[one] = torch.empty_like(grad)
        torch._foreach_copy_([self._gradients[one] for one in new], list(new.values()))
        for one in new:
            one.grad = self._gradients[one]

    def give_up(self, error: Exception) -> None:
        """Leave out CUDA graphs from now on, or without them: leave all layers as they are.

        Args:
            error: of the compiler, or of the graphs.
        """
        said = shown(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        if self.cuda_graphs:
            self.give_up_graphs(said)
            return
        for layer in self._layers:
            layer._compiled_call_impl = None
        if self.trouble is None:
            self.trouble = said
            warnings.warn(
                f"The layers of encoder and decoder run without being compiled, since that failed ({self.trouble}).",
                stacklevel=2,
            )

    def give_up_graphs(self, reason: str) -> None:
        """Compile the layers without CUDA graphs from now on; one warning says why.

        Args:
            reason: on one line.
        """
        if not self.cuda_graphs:
            return
        self.cuda_graphs, self.trouble_with_graphs = False, reason
        self._gradients.clear()
        self._compile(backend=self._backend)
        warnings.warn(
            f"The layers of encoder and decoder are compiled without CUDA graphs, since those failed ({reason}).",
            stacklevel=2,
        )


class _Guarded:
    """A call of a layer: the compiled one in training, or the layer's own where that fails."""

    def __init__(self, group: CompiledLayers, layer: nn.Module) -> None:
        self.group, self.layer, compiled = group, layer, layer._compiled_call_impl
        assert compiled is not None
        self.compiled: Callable[..., Any] = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        as_it_is: Callable[..., Any] = self.layer._call_impl
        if not self.layer.training or torch.compiler.is_compiling():
            return as_it_is(*args, **kwargs)
        try:
            with _settings():
                return self.compiled(*args, **kwargs)
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
