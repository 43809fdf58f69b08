"""Tables of the sensitivity to hyper-parameters."""

from __future__ import annotations

import pandas as pd

from analysis import sensitivity
from analysis.ablation import BASELINE
from analysis.sensitivity import Sensitivity
from paper_figures.workloads import plus_minus

NAMES = {"lr": "learning rate", "weight_decay": "weight decay"}


def lines(runs: pd.DataFrame) -> list[str]:
    """Return the spreads of every arm and hyper-parameter, and the width of good learning rates, as Markdown.

    Bold: more or less sensitive than AdamW, by an interval that excludes zero.

    Args:
        runs: what ``sensitivity.table`` returned.
    """
    found = sensitivity.sensitivities(runs)
    arms = sorted({one.arm for one in found}, key=lambda arm: (arm != BASELINE, arm))
    out = [
        "| hyper-parameter | values | " + " | ".join(f"`{arm}`" for arm in arms) + " |",
        "|---" * (2 + len(arms)) + "|",
    ]
    for name in dict.fromkeys(one.name for one in found):
        of = {one.arm: one for one in found if one.name == name}
        values = ", ".join(f"{value:g}" for value in of[BASELINE].values)
        out.append(f"| {NAMES.get(name, name)} | {values} | {' | '.join(_cell(of[arm]) for arm in arms)} |")
    widths = [sensitivity.good_decades(runs, arm) for arm in arms]
    texts = [f"{'at least ' if cut else ''}{decades:.2f} decades" for decades, cut in widths]
    out.append(f"| good learning rates | within {sensitivity.GOOD:g} nats of the best | {' | '.join(texts)} |")
    return out


def _cell(one: Sensitivity) -> str:
    if one.spread is None:
        return f"diverged (at {one.worst:g})"
    text = f"{one.spread.mean:.3f}"
    if one.difference is not None:
        difference = plus_minus(one.difference, "+.3f")
        decided = one.difference.n > 1 and one.difference.excludes_zero
        text += f" (**{difference}**)" if decided else f" ({difference})"
    return f"{text}, worst at {one.worst:g}"
