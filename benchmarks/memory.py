"""Measure what a call allocates, from the events of torch's CPU allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """Allocations of one call, in bytes, not counting memory allocated before it.

    Attributes:
        largest: the largest single allocation.
        peak: the largest sum of live allocations.
    """

    largest: int
    peak: int


def allocations(call: Callable[[], Any]) -> Allocations:
    """Measure the allocations of one call.

    torch's profiler reports all events of the allocator, including those inside an operation, such as the copy of a
    cast. A dispatch mode would miss those. C++ code that calls malloc directly is not measured; in the native loop
    these are some kilobytes, for the sums per column and per chunk.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    living = peak = 0
    for event in sorted(
        events, key=lambda e: e.start_ns()
    ):  # A stable sort keeps simultaneous events in recorded order.
        living += event.nbytes()
        peak = max(peak, living)
    return Allocations(max((e.nbytes() for e in events), default=0), peak)
