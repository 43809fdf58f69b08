"""What a step allocates: every allocation and release of torch's CPU allocator, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """Of one call, in bytes, beyond what was there before.

    Attributes:
        largest: the largest single allocation.
        peak: the most that lived at one time.
    """

    largest: int
    peak: int


def allocations(call: Callable[[], Any]) -> Allocations:
    """Measure one call.

    torch's profiler reports the allocator's events, those inside an operation too (copies that a cast makes, for
    instance), which a dispatch mode, seeing operations from outside, would miss. Neither sees what C++ code takes from
    malloc itself: the native loop's sums per column and per piece, kilobytes.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    living = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):  # stable: ties stay in the order of recording
        living += event.nbytes()
        peak = max(peak, living)
    return Allocations(max((e.nbytes() for e in events), default=0), peak)
