"""Results that are kept from step to step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

Result = TypeVar("Result")


class KeptResult(Generic[Result]):
    """The last result of a function that is asked for the same again and again, as of the layers that do not train."""

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] = ((), None, None)

    def of(self, inputs: Sequence[Tensor], settings: Hashable, compute: Callable[[], Result]) -> Result:
        """What `compute` gives; asked again when a setting is another, or an input was replaced, moved or written to.

        Args:
            inputs: all tensors that the result depends on.
            settings: all that it depends on beside them.
            compute: called without gradients.
        """
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in inputs):
            return compute()  # whether such tensors have been written to is not known
        state = (settings, *((t._version, t.untyped_storage()._cdata, t.device, t.dtype) for t in inputs))
        known, known_state, result = self._kept  # one read and one write: threads may share the module
        if state != known_state or any(one is not other for one, other in zip(inputs, known, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                result = compute()
            # A tensor that only stands for one, where memory is estimated, must not outlive the estimate.
            if not is_fake(torch.empty(0)) or (inputs and all(is_fake(tensor) for tensor in inputs)):
                self._kept = (tuple(inputs), state, result)
        kept: Result = result
        return kept

    def __getstate__(self) -> dict[str, Any]:
        """Nothing is kept in copies and files: their tensors are others."""
        return {"_kept": ((), None, None)}
