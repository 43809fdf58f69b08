"""Ways of the native loop through memory, and the choice of the fastest one by timing the steps of training."""

from __future__ import annotations

import logging
from statistics import median
from typing import NamedTuple

logger = logging.getLogger("optimizer")

LARGE = 1 << 22
"""Elements of a group from which on ways are timed. The step of a smaller group is short, and noise decides."""
ROUNDS = 5
"""How often each way is timed."""
_WORTH = 0.97  # a way replaces the default if it takes at most this share of its time


class Way(NamedTuple):
    """How the native loop goes through memory; the defaults were the fastest on an Intel Xeon with 2 MiB of L2 cache.

    No way changes a result: chunks and strips consist of whole runs, and each run's sum has a fixed order.

    Attributes:
        chunk: elements of a chunk of rows, which one thread processes.
        strip: smallest number of columns that are summed and updated together, where blocks are columns. Wide strips
            read memory in long contiguous ranges, but read the gradient the second time from a slower cache.
        ahead: how many elements ahead the loop of quantised moments prefetches.
        fetch: 1 if sums of squares prefetch what the update will read.
    """

    chunk: int = 1 << 15
    strip: int = 4096
    ahead: int = 512
    fetch: int = 1


DEFAULT = Way()
OTHERS = (
    DEFAULT._replace(chunk=1 << 13),
    DEFAULT._replace(chunk=1 << 17),
    DEFAULT._replace(strip=1024),
    DEFAULT._replace(strip=1 << 14),
    DEFAULT._replace(ahead=128),
    DEFAULT._replace(ahead=2048),
    DEFAULT._replace(fetch=0),
)
"""Ways that differ from the default in one number."""
TRIALS = ROUNDS * (len(OTHERS) + 3)
"""After this many steps of a large group the choice is made."""


class Chooser:
    """The way of one parameter group, found by timing its steps.

    The steps are real ones, so nothing is computed twice. First the default and all others are timed in turns. What was
    at least 3 % faster than the default is put together, number by number, and timed against the default in turns. It
    is used from then on if it still is. The choice lasts as long as the process: measuring costs less than a file that
    might come from another machine.
    """

    def __init__(self) -> None:
        self._candidates: tuple[Way, ...] = (DEFAULT, *OTHERS)
        self._times: dict[Way, list[float]] = {way: [] for way in self._candidates}
        self._steps, self._final = 0, False
        self.way = DEFAULT
        """The way of the next step."""

    @property
    def settled(self) -> bool:
        """Whether the choice is made."""
        return not self._candidates

    def took(self, seconds: float, elements: int) -> None:
        """Record the time of a step that went ``way``, and choose the way of the next one.

        Args:
            seconds: its time.
            elements: how many elements were stepped; nothing is recorded of fewer than ``LARGE``.
        """
        if self.settled or elements < LARGE:
            return
        self._times[self.way].append(seconds / elements)
        self._steps += 1
        if self._steps == ROUNDS * len(self._candidates):
            self._conclude()
        else:
            self.way = self._candidates[self._steps % len(self._candidates)]

    def _conclude(self) -> None:
        usual = median(self._times[DEFAULT])
        share = {way: median(self._times[way]) / usual for way in self._candidates}
        if self._final:
            chosen = self._candidates[-1]
            self.way, self._candidates = chosen if share[chosen] <= _WORTH else DEFAULT, ()
            if self.way != DEFAULT:
                logger.info("the native step goes %s, in %.0f %% of the default's time", self.way, 100 * share[chosen])
            return
        best = DEFAULT
        for field, usual_value in DEFAULT._asdict().items():
            fastest = min((way for way in OTHERS if getattr(way, field) != usual_value), key=share.__getitem__)
            if share[fastest] <= _WORTH:
                best = best._replace(**{field: getattr(fastest, field)})
        self.way, self._steps, self._final = DEFAULT, 0, True
        self._candidates = (DEFAULT, best) if best != DEFAULT else ()
        self._times = {way: [] for way in self._candidates}
