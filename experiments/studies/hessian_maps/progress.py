"""What the study shows while it runs: one bar over all stages, one for the work inside the current stage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from tqdm import tqdm

from experiments.studies.hessian_maps.cache import Arrays, StageCache


class Progress(Protocol):
    """Called by a stage as its work advances."""

    def __call__(self, done: int, total: int, what: str) -> None:
        """Report the state of a stage.

        Args:
            done: units of work that are finished.
            total: units of work altogether.
            what: what is being worked on, for instance ``exact Hessian`` or a matrix's name.
        """


class Stages:
    """A bar over all stages, and one inside the running stage that names the model and what is measured of it.

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
            cache: where finished stages lie.
            name: the stage's name in the cache.
            title: which model in which state, as the bar shows it.
            inputs: what the stage's result depends on.
            compute: computes the stage; takes the callback that moves the bar.
        """
        self._bar.set_postfix_str(title)
        inner = StageBar(title)
        try:
            return cache.get(name, inputs, lambda: compute(inner))
        finally:
            inner.close()
            self._bar.update()

    def close(self) -> None:
        """End the bar over all stages."""
        self._bar.close()


class StageBar:
    """The bar of one stage; it starts again whenever the stage turns to something else.

    Args:
        title: which model in which state.
    """

    def __init__(self, title: str) -> None:
        self._title, self._what = title, ""
        self.bar: tqdm[Any] = tqdm(desc=f"  {title}", leave=False, file=sys.stderr)

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show progress; see ``Progress``."""
        if what != self._what:
            self._what = what
            self.bar.reset(total)
            self.bar.set_description_str(f"  {self._title}: {what}")
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
