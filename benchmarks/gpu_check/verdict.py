"""Checks, their outcomes, and the verdict, which cannot be PASSED unless everything ran on a CUDA device."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PASSED, FAILED, INCOMPLETE, NOT_RUN = "PASSED", "FAILED", "INCOMPLETE", "NOT RUN"
EXIT_CODES = {PASSED: 0, FAILED: 1, INCOMPLETE: 3}
"""Exit code of each verdict; 2 is for a machine without a device."""
RUNS_ON = "cuda"


class NotRun(Exception):
    """A check cannot run here; the message says why."""


@dataclass
class Evidence:
    """What a check saw.

    Attributes:
        devices: devices of the tensors that it computed, as torch names them.
        note: one line with numbers.
    """

    devices: set[str] = field(default_factory=set)
    note: str = ""

    def saw(self, tensors: Iterable[Tensor]) -> None:
        """Record the devices of tensors that the checked code has written."""
        self.devices |= {str(t.device) for t in tensors}


@dataclass(frozen=True)
class Check:
    """A check: ``run`` gets the device, raises AssertionError if it fails and ``NotRun`` if it cannot run."""

    name: str
    run: Callable[[torch.device], Evidence]


@dataclass(frozen=True)
class Outcome:
    """How a check ended.

    Attributes:
        name: name of the check.
        state: ``PASSED``, ``FAILED`` or ``NOT RUN``.
        devices: devices of the tensors that it computed.
        note: numbers, or why it failed or did not run.
        seconds: how long it took.
    """

    name: str
    state: str
    devices: tuple[str, ...] = ()
    note: str = ""
    seconds: float = 0.0


def outcome_of(check: Check, device: torch.device) -> Outcome:
    """Run a check and judge where it ran: results on any other device than the one asked for are a failure."""
    started = time.perf_counter()
    try:
        evidence = check.run(device)
    except NotRun as error:
        return Outcome(check.name, NOT_RUN, note=str(error), seconds=time.perf_counter() - started)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
        text = " ".join(f"{type(error).__name__} at {where}: {error}".split())
        return Outcome(check.name, FAILED, note=text[:400], seconds=time.perf_counter() - started)
    devices, seconds = tuple(sorted(evidence.devices)), time.perf_counter() - started
    elsewhere = [name for name in devices if torch.device(name).type != device.type]
    if not devices or elsewhere:
        where = f"on {', '.join(elsewhere)}" if elsewhere else "nowhere that it recorded"
        return Outcome(check.name, FAILED, devices, f"computed {where}, not on {device}; {evidence.note}", seconds)
    return Outcome(check.name, PASSED, devices, evidence.note, seconds)


def verdict(outcomes: Sequence[Outcome], wanted: Sequence[str]) -> tuple[str, list[str]]:
    """Judge all outcomes.

    Args:
        outcomes: the outcomes.
        wanted: names of all checks that exist.

    Returns:
        (``PASSED``, ``FAILED`` or ``INCOMPLETE``; the reasons, none for ``PASSED``).
    """
    failed = [f"{outcome.name}: {outcome.note}" for outcome in outcomes if outcome.state == FAILED]
    if failed:
        return FAILED, failed
    names = [outcome.name for outcome in outcomes]
    missing = [f"{name}: {NOT_RUN}" for name in wanted if name not in names]
    missing += [f"{o.name}: {NOT_RUN}, {o.note}" for o in outcomes if o.state != PASSED]
    missing += [
        f"{o.name}: ran on {', '.join(o.devices) or 'no device'}, which is no {RUNS_ON} device"
        for o in outcomes
        if o.state == PASSED and not (o.devices and all(torch.device(d).type == RUNS_ON for d in o.devices))
    ]
    missing += ["no check exists"] if not wanted else []
    return (INCOMPLETE, missing) if missing else (PASSED, [])
