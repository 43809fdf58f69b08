"""Show the progress of the study with one bar for all stages and one for the current stage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from tqdm import tqdm

from experiments.studies.hessian_maps.cache import Arrays, StageCache


class Progress(Protocol):
    """A callback that a stage calls as its work advances."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report the progress of a stage.

        Args:
            done: number of finished units of work.
            total: number of all units of work.
            what: description of the current work, for example ``exact Hessian`` or the name of a matrix.
        """


class Stages:
    """A progress bar for all stages, and one for the running stage.

    Args:
        total: number of stages.
    """

    def __init__(self, total: int) -> None:
        self._bar: tqdm[Any] = tqdm(total=total, desc="stages", unit="stage", file=sys.stderr)

    def run(
        self, cache: StageCache, name: str, title: str, inputs: Any, compute: Callable[[Progress], Arrays]
    ) -> Arrays:
        """Run one stage through the cache.

        Args:
            cache: cache of finished stages.
            name: name of the stage in the cache.
            title: description of the stage for the bar.
            inputs: JSON-able values that the stage's result depends on.
            compute: computes the arrays of the stage. Its argument is the callback that advances the bar.

        Returns:
            The arrays of the stage.
        """
        self._bar.set_postfix_str(title)
        inner = StageBar(title)
        try:
            return cache.get(name, inputs, lambda: compute(inner))
        finally:
            inner.close()
            self._bar.update()

    def close(self) -> None:
        """Close the bar of all stages."""
        self._bar.close()


class StageBar:
    """The progress bar of one stage. It restarts when the description of the work changes.

    Args:
        title: description of the stage.
    """

    def __init__(self, title: str) -> None:
        self._title, self._what = title, ""
        self.bar: tqdm[Any] = tqdm(desc=f"  {title}", leave=False, file=sys.stderr)

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show that ``done`` of ``total`` units of the work described by ``what`` are finished."""
        if what != self._what:
            self._what = what
            self.bar.reset(total)
            self.bar.set_description_str(f"  {self._title}: {what}")
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
