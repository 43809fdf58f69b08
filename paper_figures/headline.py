"""Figure and table of the headline: every arm against AdamW in every place, each at its own best rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib.pyplot as plt

from analysis.ablation import BASELINE
from analysis.settings import Comparison, Setting, compare
from paper_figures.style import COLOURS, save

ALPHA = 0.05
"""Corrected p-value below which an arm differs from AdamW."""
LINEAR = 0.02
"""Nats up to which the figure's axis is linear. Beyond, it is logarithmic, because the differences span decades."""
TICKS = (-0.3, -0.1, -0.02, 0.0, 0.02, 0.1, 0.3)
Found: TypeAlias = Mapping[str, Mapping[str, Comparison]]


def place(setting: Setting) -> str:
    """Return a setting's architecture and corpus in words."""
    return f"{setting.shared['model']['kind'].removesuffix('Config')}, {setting.shared['data']}"


def by_place(settings: Sequence[Setting]) -> Found:
    """Return the comparisons of every setting with AdamW: place -> arm -> comparison."""
    return {place(setting): {one.arm: one for one in compare(setting.runs)} for setting in sorted(settings, key=place)}


def ordered(found: Found) -> list[str]:
    """Return the arms, the one with the lowest mean difference to AdamW over the places first."""
    gaps: dict[str, list[float]] = {}
    for arms in found.values():
        for arm, one in arms.items():
            gaps.setdefault(arm, []).append(one.loss - arms[BASELINE].loss)
    return sorted(gaps, key=lambda arm: sum(gaps[arm]) / len(gaps[arm]))


def lines(settings: Sequence[Setting]) -> list[str]:
    """Return every arm's difference to AdamW in every setting, each at its best rate; the lowest mean comes first.

    Bold differences have a corrected p-value below ``ALPHA``.
    """
    found = by_place(settings)
    out = ["| arm | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for arm in ordered(found):
        cells = [_cell(arms[arm]) if arm in arms else "–" for arms in found.values()]
        out.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return out


def _cell(one: Comparison) -> str:
    where = f"at {one.lr:g}" + (" (edge)" if one.at_edge else "")
    if one.diverged:
        return f"{one.diverged} diverged, {where}"
    if one.arm == BASELINE:
        return f"{one.loss:.4f}, {where}"
    if one.difference is None:
        return "no pair"
    if one.n == 1:
        return f"{one.difference.mean:+.4f}, n = 1, {where}"
    text = f"{one.difference.mean:+.4f} ± {one.difference.half:.4f}"
    return (f"**{text}**" if one.p_corrected < ALPHA else text) + f", n = {one.n}, {where}"


def draw(settings: Sequence[Setting], out: Path) -> Path:
    """Draw every arm's difference to AdamW, one panel per place; filled points differ by the corrected p-value.

    An arm without an interval (one seed, or a diverged run) has no point; the table says why.
    """
    found = by_place(settings)
    arms = [arm for arm in ordered(found) if arm != BASELINE]
    size = (2.3 * len(found) + 1.4, 0.27 * len(arms) + 1.2)
    figure, grid = plt.subplots(1, len(found), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, (name, ones) in zip(grid[0], found.items(), strict=True):
        shown = [(arms.index(arm), one) for arm, one in ones.items() if one.difference and one.n > 1]
        for row, one in shown:
            gap, filled = one.difference, one.p_corrected < ALPHA
            assert gap is not None
            face = COLOURS[0] if filled else "white"
            axes.errorbar(gap.mean, row, xerr=gap.half, fmt="o", color=COLOURS[0], mfc=face, ms=5, capsize=2)
        axes.axvline(0, color=COLOURS[6], lw=1)
        axes.set_xscale("symlog", linthresh=LINEAR)
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS], rotation=90)
        axes.minorticks_off()
        sizes = " or ".join(map(str, sorted({one.n for _, one in shown})))
        axes.set_title(f"{name}, n = {sizes or 1}", fontsize=8)
    grid[0][0].set_yticks(range(len(arms)), arms)
    grid[0][0].invert_yaxis()
    figure.supxlabel(
        f"final loss minus AdamW's (nats; linear up to {LINEAR:g}, then logarithmic), 95 % intervals; "
        f"filled: corrected p < {ALPHA:g}",
        fontsize=9,
    )
    return save(figure, out, "headline")
