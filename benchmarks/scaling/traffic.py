"""Bytes that a rank sends per step, for the optimizer's messages and for gradients and parameters."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from benchmarks.scaling.simulate import Message
from benchmarks.scaling.weights import Weight

GATHERED, REDUCED = 2, 4
"""Bytes of an element: parameters are gathered in bf16, and gradients are reduced in fp32."""
SUM = 4
"""Bytes of a number in the optimizer's messages; second moments are fp32."""


def all_reduced(messages: Iterable[Message]) -> float:
    """Return the bytes that a rank sends in ring all-reduces of the messages: 2 (n - 1) / n of each message."""
    return sum(2 * (m.ranks - 1) / m.ranks * m.numbers * SUM for m in messages)


def gradients(weights: Iterable[Weight], dp: int, tp: int = 1, gathers: int = 2) -> float:
    """Return the bytes that a rank sends for parameters and gradients in data-parallel rings.

    Args:
        weights: the model's weights.
        dp: number of data-parallel ranks; an all-gather or a reduce-scatter sends (dp - 1) / dp of the tensor.
        tp: number of tensor-parallel ranks. The activations that they exchange are not counted, because they depend on
            the batch.
        gathers: number of all-gathers of every parameter: 2 if it is freed after the forward pass (FSDP2, ZeRO-3), 1 if
            it stays in memory (ZeRO 1 and 2).
    """
    elements = sum(prod(w.shape) / (1 if w.axis is None else tp) for w in weights)
    return (dp - 1) / dp * elements * (gathers * GATHERED + REDUCED)
