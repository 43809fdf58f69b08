"""Bytes on the wire per rank: the optimizer's messages, and the gradients' and parameters' of the same step."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from benchmarks.scaling.simulate import Message
from benchmarks.scaling.weights import Weight

GATHERED, REDUCED = 2, 4
"""Bytes of an element: parameters are gathered in bf16, gradients are reduced in fp32."""
SUM = 4
"""Bytes of a number in the optimizer's message: second moments are fp32."""


def all_reduced(messages: Iterable[Message]) -> float:
    """Bytes that a rank sends in ring all-reduces of the messages: 2 (n - 1) / n of each."""
    return sum(2 * (m.ranks - 1) / m.ranks * m.numbers * SUM for m in messages)


def gradients(weights: Iterable[Weight], dp: int, tp: int = 1, gathers: int = 2) -> float:
    """Bytes that a rank sends for parameters and gradients along data parallelism, in rings.

    Args:
        weights: of the model.
        dp: ranks that share the data; an all-gather or a reduce-scatter sends (n - 1) / n of the tensor.
        tp: ranks that share a tensor. What they send each other is activations, which depend on the batch: left out.
        gathers: all-gathers of every parameter: 2 where it is freed after the forward pass (FSDP2, ZeRO-3), 1 where
            it is kept (ZeRO 1 and 2).
    """
    elements = sum(prod(w.shape) / (1 if w.axis is None else tp) for w in weights)
    return (dp - 1) / dp * elements * (gathers * GATHERED + REDUCED)
