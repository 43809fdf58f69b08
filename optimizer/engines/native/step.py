"""Tensors in, one call for all of them out."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ...partition.layout import Layout
from ...partition.roles import viewed
from .library import library

_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_PAIRS = {(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 3)}
"""(parameter and gradient, first moment) the loop is compiled for."""
_PLAIN = (Tensor, torch.nn.Parameter)


def describe(layout: Layout, shape: Sequence[int]) -> Tensor:
    """A layout as the loop reads it: outer, between, axis, inner, repeat, segments, then (length, count) pairs."""
    view = viewed(tuple(shape), layout.fold) or (1,)
    lead, axis = len(layout.leading), layout.axis
    numbers = [prod(view[:lead]), prod(view[lead:axis]), view[axis], prod(view[axis + 1 :]), layout.runs.repeat,
               len(layout.runs.segments)]  # fmt: skip
    return torch.tensor(numbers + [n for pair in layout.runs.segments for n in pair], dtype=torch.int64)


def accepts(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[int, int] | None:
    """The (parameter, moment) types to call the loop with, or None where it cannot take these tensors."""
    if type(param) not in _PLAIN or type(grad) is not Tensor or grad.dtype is not param.dtype:
        return None
    code, moment = _CODES.get(param.dtype), _CODES.get(exp_avg.dtype)
    if code is None or moment is None or (code, moment) not in _PAIRS or param.device.type != "cpu":
        return None
    if not (param.is_contiguous() and grad.is_contiguous() and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
        return None
    return code, moment


def step(
    tensors: Sequence[tuple[Tensor, ...]],
    kinds: tuple[int, int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of tensors that ``accepts`` gave one answer for.

    Args:
        tensors: (param, grad, exp_avg, exp_avg_sq, step, layout) each: the first four as in
            ``optimizer.update.adam_mini_update``, step 0-dim fp32 and advanced here, layout from ``describe``.
        kinds: from ``accepts``.
        lr, beta1, beta2, eps, weight_decay, maximize: as in ``adam_mini_update``.
    """
    loaded = library()
    assert loaded is not None
    pointers = array("q")
    for six in tensors:
        pointers.extend([tensor.data_ptr() for tensor in six])
    loaded.adam_mini_step(
        len(tensors), pointers.buffer_info()[0], *kinds, lr, beta1, beta2, eps, weight_decay, -1.0 if maximize else 1.0,
        1.0, torch.get_num_threads(),
    )  # fmt: skip
