"""How much state an optimizer has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIRST = frozenset({"exp_avg", "momentum_buffer", "m"})
"""Names under which optimizers store a first moment."""


@dataclass(frozen=True)
class StateSize:
    """The size of an optimizer's state, without step counters.

    Attributes:
        values: number of values; a quantized moment counts as many as the parameter has.
        first: those of first moments.
        bytes: bytes of all values, with the scales and tables of quantized moments.
    """

    values: int
    first: int
    bytes: int

    @property
    def rest(self) -> int:
        """Number of values that belong to no first moment."""
        return self.values - self.first


def state_size(optimizer: torch.optim.Optimizer) -> StateSize:
    """Measure an optimizer's state as it is now; most have none before the first step.

    Tensors in lists and in attributes of objects count. A sharded tensor (DTensor) counts as the whole tensor; state
    that a process keeps as a plain tensor counts with what this process has.
    """
    values = first = size = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            for tensor in _tensors(value) if key != "step" else ():
                values += tensor.numel()
                first += tensor.numel() if key in FIRST else 0
                size += _bytes(tensor)
    return StateSize(values, first, size)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(list(vars(value).values()))


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the plain tensors inside a quantized one."""
    if type(tensor) is not Tensor and hasattr(tensor, "codes"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
