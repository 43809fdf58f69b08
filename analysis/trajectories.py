"""How far the weights of other optimizers go from AdamW's, with intervals over seeds. See docs/protocol.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.documents import read_object
from analysis.stats import Interval, t_interval

CONTROLS = ("perturbed", "other batches")
"""AdamW from slightly different weights, and AdamW on other batches."""


@dataclass(frozen=True)
class Trajectory:
    """An arm's way.

    Attributes:
        arm: the arm, or a control.
        steps: steps at which it was measured, [points].
        distance: from AdamW's weights, divided by how far those have moved, mean over seeds, [points].
        last: the distance at the last step, over seeds.
        cosine: of the two displacements at the last step, over seeds.
        difference: distance at the last step minus that of ``adam_mini``, paired by seed; None for ``adam_mini``.
    """

    arm: str
    steps: np.ndarray
    distance: np.ndarray
    last: Interval
    cosine: Interval
    difference: Interval | None


def load(path: Path, against: str = "adam_mini") -> list[Trajectory]:
    """Read the file of ``experiments.studies.trajectories``, closest arm first.

    Args:
        path: the file.
        against: the arm that others are compared with.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, or has no seed or not this arm.
    """
    again = "run `python -m experiments.studies.trajectories` again"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {again}")
    seeds = read_object(path, again).get("seeds")
    try:
        ways = {arm: [seed["arms"][arm] for seed in seeds.values()] for arm in next(iter(seeds.values()))["arms"]}
        steps = np.array(next(iter(seeds.values()))["steps"])
        base = np.array([way["distance"][-1] for way in ways[against]])
        found = []
        for arm, of in ways.items():
            curves = np.array([way["distance"] for way in of])
            paired = None if arm == against else t_interval((curves[:, -1] - base).tolist())
            cosine = t_interval([way["cosine"][-1] for way in of])
            found.append(Trajectory(arm, steps, curves.mean(0), t_interval(curves[:, -1].tolist()), cosine, paired))
    except (AttributeError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} has no distances of {against!r} ({error!r}); {again}") from error
    return sorted(found, key=lambda one: one.last.mean)
