"""Limits on the optimizer's speed and memory, called bars, and the verdict of a benchmark run on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
MAIN_CASE = "llama-45M fp32 2 threads"
BF16_CASE = "llama-45M bf16 2 threads"
GPT2_CASES = ("gpt2-124M fp32 2 threads", "gpt2-124M bf16 2 threads")
STATE_CASES = ("llama-100M fp32 2 threads", "llama-100M bf16 2 threads")
ENOUGH = 25
"""Rounds that a verdict on a time needs."""
QUIET = 0.1
"""Cores that other processes may use during a valid timing; with more, two threads on two cores wait for each other."""


@dataclass(frozen=True)
class Bar:
    """One upper limit.

    Attributes:
        what: the measured quantity in words.
        most: the limit, in ``unit``.
        unit: unit of the limit and of the value.
        value: function of a run's results that returns the measured value.
        source: for times, function of the results that returns the number of rounds (``n``) and the cores that other
            processes used (``others_cores``).
        enough: number of rounds that a verdict needs.
    """

    what: str
    most: float
    unit: str
    value: Callable[[Results], float]
    source: Callable[[Results], Mapping[str, Any]] | None = None
    enough: int = 1

    def objection(self, results: Results) -> str:
        """Return why this run allows no verdict, or "" if it allows one."""
        if self.source is None:
            return ""
        source = self.source(results)
        others = source.get("others_cores")
        if others is not None and others > QUIET:
            return f"no verdict: other processes took {others:.1f} cores"
        n = source.get("n", self.enough)
        return f"no verdict: {n} rounds, {self.enough} wanted" if n < self.enough else ""


@dataclass(frozen=True)
class Verdict:
    """A bar and a run's verdict on it; ``value`` is None if the run did not measure it."""

    bar: Bar
    value: float | None
    verdict: str


def _row(case: str, contestant: str) -> Callable[[Results], Mapping[str, Any]]:
    return lambda results: results["cases"][case]["rows"][contestant]


def _number(case: str, contestant: str, key: str) -> Callable[[Results], float]:
    return lambda results: _row(case, contestant)(results)[key]


def _time(what: str, most: float, case: str, contestant: str) -> Bar:
    """Return a bar on the median ratio to fused AdamW in the same round, from at least 25 rounds."""
    return Bar(what, most, "x", _number(case, contestant, "ratio"), _row(case, contestant), ENOUGH)


def _temporary(what: str, most: float, contestant: str, key: str) -> Bar:
    """Return a bar on a temporary's size, the larger of the fp32 and the bf16 case."""
    return Bar(what, most, "%", lambda r: 100 * max(_row(c, contestant)(r)[key] for c in (MAIN_CASE, BF16_CASE)))


def _state(what: str, most: float, case: str, contestant: str) -> Bar:
    return Bar(what, most, "B", _number(case, contestant, "state_bytes_per_parameter"))


def _on_both(what: str, contestant: str, llama: float, gpt2: float, *, bf16: bool = False) -> tuple[Bar, Bar]:
    """Return bars on the same optimizer for a Llama, whose blocks are rows, and for GPT-2, whose blocks are columns."""
    cases = (BF16_CASE if bf16 else MAIN_CASE, GPT2_CASES[bf16])
    models = ("45M Llama", "GPT-2 124M")
    one, two = (
        _time(f"{what}, {model}, against fused AdamW{' in bf16' if bf16 else ''}", most, case, contestant)
        for model, most, case in zip(models, (llama, gpt2), cases, strict=True)
    )
    return one, two


BARS = (
    *_on_both("fused, fp32", "AdamMini fused", 0.78, 0.80),
    *_on_both("fused, bf16 with bf16 momentum", "AdamMini fused, bf16 moment", 0.80, 0.85, bf16=True),
    _time("fused, bf16 with fp32 momentum, 45M Llama, against fused AdamW in bf16", 0.85, BF16_CASE, "AdamMini fused"),
    *_on_both("fused, int8 momentum", "AdamMini fused, int8 moment", 0.80, 0.95),
    *_on_both("fused, int4 momentum", "AdamMini fused, int4 moment", 0.95, 1.2),
    *_on_both("fused, factored", "AdamMini fused, factored", 0.92, 0.92),
    _time("eager, fp32, 45M Llama, against fused AdamW", 1.25, MAIN_CASE, "AdamMini eager"),
    *_on_both("eager, bf16", "AdamMini eager", 4.0, 4.0, bf16=True),
    *_on_both("foreach, bf16", "AdamMini foreach", 4.0, 4.0, bf16=True),
    _temporary("new bytes of a fused step, of the largest tensor", 0.1, "AdamMini fused", "peak_of_largest"),
    _temporary("new bytes of an eager step, of the largest tensor", 2.0, "AdamMini eager", "peak_of_largest"),
    _temporary("new bytes of a foreach step, of the group", 5.0, "AdamMini foreach", "peak_of_group"),
    _state("state per parameter, 100M Llama, fp32", 4.01, STATE_CASES[0], "AdamMini fused"),
    _state("state per parameter, 100M Llama, bf16", 2.01, STATE_CASES[1], "AdamMini fused, bf16 moment"),
    _state("state per parameter, 100M Llama, int8", 1.10, STATE_CASES[0], "AdamMini fused, int8 moment"),
    _state("state per parameter, 100M Llama, int4", 0.62, STATE_CASES[0], "AdamMini fused, int4 moment"),
    Bar(
        "Python per tensor, fused",
        2.0,
        "us",
        lambda r: r["overhead"]["AdamMini fused"]["per_tensor"],
        lambda r: r["overhead"],
    ),
    Bar(
        "first step of 32 layers, compiled before",
        10.0,
        "s",
        lambda r: r["startup"]["warm"]["first_s"],
        lambda r: {"others_cores": r["startup"]["others_cores"]},
    ),
    Bar(
        "first step of 32 layers, nothing compiled",
        60.0,
        "s",
        lambda r: r["startup"]["cold"]["first_s"],
        lambda r: {"others_cores": r["startup"]["others_cores"]},
    ),
)


def verdicts(results: Results) -> list[Verdict]:
    """Return PASS, FAIL or the reason for no verdict for every bar. Times need a quiet machine; bytes do not."""
    out = []
    for bar in BARS:
        try:
            value = float(bar.value(results))
        except KeyError:
            out.append(Verdict(bar, None, "not in this run"))
            continue
        out.append(Verdict(bar, value, bar.objection(results) or ("PASS" if value <= bar.most else "FAIL")))
    return out
