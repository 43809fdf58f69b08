"""Figure and table of the trajectories: distance of other optimizers' weights from AdamW's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from analysis.trajectories import CONTROLS, Trajectory
from paper_figures.report.figures import DASHES, looks
from paper_figures.style import save
from paper_figures.workloads import plus_minus

LINES = dict(zip(DASHES, ("-", "--", ":", "-.", (0, (8, 3))), strict=True))


def draw(found: Sequence[Trajectory], out: Path) -> Path:
    """Draw the distance over the run; controls are grey."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    drawn = looks([one.arm for one in found if one.arm not in CONTROLS])
    for one in found:
        look = drawn.get(one.arm)
        style = {"color": look.colour, "ls": LINES[look.dash]} if look else {"color": "#999999", "lw": 2.2}
        control = f"AdamW, {'weights changed by 1e-6' if one.arm == CONTROLS[0] else one.arm}"
        axes.plot(one.steps, one.distance, label=one.arm if look else control, **style)
    n = found[0].last.n
    axes.set_ylim(bottom=-0.02)
    axes.set_xlabel("step")
    axes.set_ylabel(f"distance from AdamW's weights,\nas a share of their way (mean, n = {n})")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return save(figure, out, "trajectories")


def lines(found: Sequence[Trajectory]) -> list[str]:
    """Return the distances at the last step as Markdown, closest first."""
    out = [
        "| optimizer | distance | minus `adam_mini`'s, paired | cosine of the two ways | n |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        difference = "–" if one.difference is None else plus_minus(one.difference, "+.3f")
        name = f"AdamW, {one.arm}" if one.arm in CONTROLS else f"`{one.arm}`"
        cells = (name, plus_minus(one.last, ".3f"), difference, plus_minus(one.cosine, ".3f"), str(one.last.n))
        out.append(f"| {' | '.join(cells)} |")
    return out
