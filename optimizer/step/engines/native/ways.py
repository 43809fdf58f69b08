"""Ways of the native loop through memory, and the choice of the fastest one by timing the steps of training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

logger = logging.getLogger("optimizer")

LARGE = 1 << 22
"""Elements of a group from which on ways are timed. The step of a smaller group is short, and noise decides."""
ROUNDS = 5
"""How often each way is timed."""
PAIRS, _WINS = 20, 16
"""Length of the race against the default, and how many pairs must be won: by chance, 16 of 20 are in 0.6 %."""
_WORTH = 0.97  # a way replaces the default if it takes at most this share of its time


class Way(NamedTuple):
    """How the native loop goes through memory; the defaults were the fastest on an Intel Xeon with 2 MiB of L2 cache.

    No way changes a result: chunks and strips consist of whole runs, and each run's sum has a fixed order.

    Attributes:
        chunk: elements of a chunk of rows, which one thread processes.
        strip: smallest number of columns that are summed and updated together, where blocks are columns. Wide strips
            read memory in long contiguous ranges, but read the gradient the second time from a slower cache. A step of
            GPT-2 took 2.0 times as long as torch's fused AdamW with 64 columns, 1.1 times with 512, 0.85 with 4096.
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
TRIALS = ROUNDS * (len(OTHERS) + 1) + 2 * PAIRS
"""After this many steps of a large group the choice is made."""


class Chooser:
    """The way of one parameter group, found by timing its steps.

    The steps are real ones, so nothing is computed twice. First the default and all others are timed in turns. What was
    at least 3 % faster than the default is put together, number by number, and raced against the default in pairs of
    steps. It is used from then on if it is again 3 % faster and wins nearly all pairs, which on a busy machine, where
    times are chance, it does not. The choice lasts as long as the optimizer: measuring costs less than a file that
    might come from another machine.
    """

    def __init__(self) -> None:
        self._candidates: tuple[Way, ...] = (DEFAULT, *OTHERS)
        self._times: list[float] = []  # of the candidates in turns, per element
        self._rounds = ROUNDS
        self.way = DEFAULT
        """The way of the next step."""

    @property
    def settled(self) -> bool:
        """Whether the choice is made."""
        return len(self._candidates) == 1

    def took(self, seconds: float, elements: int) -> None:
        """Record the time of a step that went ``way``, and choose the way of the next one.

        Args:
            seconds: its time.
            elements: how many elements were stepped; nothing is recorded of fewer than ``LARGE``.
        """
        if self.settled or elements < LARGE:
            return
        self._times.append(seconds / elements)
        count = len(self._candidates)
        if len(self._times) == self._rounds * count:
            by_way = {way: self._times[i::count] for i, way in enumerate(self._candidates)}
            self._candidates = (DEFAULT, *_promising(by_way)) if self._rounds == ROUNDS else (_winner(by_way),)
            self._times, self._rounds = [], PAIRS
            if self.settled and self._candidates != (DEFAULT,):
                logger.info("the native step goes %s from now on, the fastest way on this machine", self._candidates[0])
        self.way = self._candidates[len(self._times) % len(self._candidates)]


def _promising(times: Mapping[Way, list[float]]) -> list[Way]:
    """Return the way with the best value of every number, or nothing if that is the default."""
    usual, best = median(times[DEFAULT]), DEFAULT
    for field, value in DEFAULT._asdict().items():
        fastest = min((way for way in OTHERS if getattr(way, field) != value), key=lambda way: median(times[way]))
        if median(times[fastest]) <= _WORTH * usual:
            best = best._replace(**{field: getattr(fastest, field)})
    return [] if best == DEFAULT else [best]


def _winner(times: Mapping[Way, list[float]]) -> Way:
    """Return the way that was raced against the default if it is faster beyond doubt, else the default."""
    (_, usual), (other, its) = times.items()
    wins = sum(one < two for one, two in zip(its, usual, strict=True))
    return other if median(its) <= _WORTH * median(usual) and wins >= _WINS else DEFAULT
