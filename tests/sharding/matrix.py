"""Every model under every wrapper on any number of ranks: ``python -m tests.sharding.matrix --ranks 5``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

from tests.sharding import parallel
from tests.sharding.suite import SAVED, Trained, identity
from tests.sharding.training import STEPS, WRAPS
from tests.sharding.workers import Case, run

MODELS = ("llama", "gpt2", "mixtral")


def cases(ranks: int) -> list[Trained]:
    """What can be run on so many ranks."""
    plain = [wrap for wrap in WRAPS if not wrap.startswith("tp") and wrap not in parallel.STYLES]
    out = [Trained(model, wrap, dtype=dtype) for model in MODELS for wrap in plain for dtype in ("float64", "float32")]
    # FSDP1 cannot wrap a tied weight apart from its twin.
    out = [case for case in out if (case.model, case.wrap) != ("gpt2", "fsdp1-layers")]
    out += [Trained("llama-parallel", "tp"), Trained("llama-parallel", "tp", dtype="float32")]
    if ranks % 2 == 0:
        out += [Trained("llama-parallel", "tp-fsdp2"), Trained("llama-parallel", "tp-fsdp2", dtype="float32")]
    return out + [case._replace(rules="factored") for case in out]


def kept(ranks: int, folder: str) -> dict[str, Case]:
    """Checkpoints between all numbers of ranks up to so many, and whole state between wrappers."""
    where = "tests.sharding.checkpoints:checkpoint_case"
    out: dict[str, Case] = {
        f"{name}-{wrap}-reshard": (where, {"name": name, "wrap": wrap, "folder": folder, "flatten": wrap == "fsdp2"})
        for name, wraps in (("llama", SAVED), ("gpt2", SAVED if ranks < 4 else ("fsdp2",))) for wrap in wraps
    }  # fmt: skip
    parallel = ("plain", "tp", "fsdp2") + (("tp-fsdp2",) if ranks % 2 == 0 else ())
    wraps = {"llama": ("plain", "fsdp1", "fsdp1-flat", "fsdp2", "hsdp"), "gpt2": ("plain", "fsdp1-flat", "fsdp2"),
             "mixtral": ("fsdp1", "fsdp2"), "llama-parallel": parallel}  # fmt: skip
    return out | {
        f"{name}-across": ("tests.sharding.whole_state:across_case", {"name": name, "wraps": own})
        for name, own in wraps.items()
    }


def report_kept(name: str, answer: list[Any]) -> bool:
    """Say how far a run that was interrupted is from one that was not; whether that is nothing."""
    whole = all(isinstance(one, dict) for one in answer)
    limit = 1e-6 if "mixtral" in name else 1e-12
    worst = max(max(one.values()) for one in answer) if whole else 0.0
    fine = whole and worst <= limit
    errors = [one for one in answer if isinstance(one, str)]
    said = f"{len(answer[0])} ways, difference {worst:.1e}" if whole else f"{errors}"
    sys.stdout.write(f"{'ok    ' if fine else 'FAILED'} {name:40} {said}\n")
    return fine


def report_styles(name: str, answer: list[Any]) -> bool:
    """Say how far a parallel style is from one process; whether that is nothing."""
    wrong = parallel.complaint(name, answer)
    said = wrong or f"difference {max(one['difference'] for one in answer):.1e}"
    sys.stdout.write(f"{'FAILED' if wrong else 'ok    '} {name:40} {said}\n")
    return not wrong


def main() -> int:
    """Print a line per case; the exit status is the number of cases that are off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--only", default="", help="a part of the cases' names")
    arguments = parser.parse_args()
    chosen = [case for case in cases(arguments.ranks) if arguments.only in identity(case)]
    with tempfile.TemporaryDirectory() as folder:
        others = {n: c for n, c in kept(arguments.ranks, folder).items() if arguments.only in n}
        trained: dict[str, Case] = {identity(c): ("train_case", c.arguments()) for c in chosen}
        styles = parallel.cases(arguments.ranks) if arguments.ranks % 2 == 0 else {}
        styles = {n: c for n, c in styles.items() if arguments.only in n}
        answers = run(arguments.ranks, trained | others | styles, timeout=3600, own_interpreters=True)
    bad = sum(not report_kept(name, answers[name]) for name in others)
    bad += sum(not report_styles(name, answers[name]) for name in styles)
    for case in chosen:
        answer = answers[identity(case)]
        if not all(isinstance(one, dict) for one in answer):
            bad += 1
            sys.stdout.write(f"FAILED {identity(case)}: {[one[:300] for one in answer if isinstance(one, str)]}\n")
            continue
        worst = max(one["difference"] for one in answer)
        fine = worst <= (1e-12 if case.dtype == "float64" and case.model != "mixtral" else 1e-6)
        fine &= all(len(one["messages"]) == STEPS * one["groups"] for one in answer)
        fine &= all(nbytes <= one["limit"] for one in answer for _, nbytes in one["messages"])
        bad += not fine
        sent = sum(nbytes for _, nbytes in answer[0]["messages"]) // STEPS
        sys.stdout.write(f"{'ok    ' if fine else 'FAILED'} {identity(case):40} difference {worst:.1e}, groups "
              f"{sorted({one['groups'] for one in answer})}, rank 0 sends {sent} bytes a step\n")  # fmt: skip
    return bad


if __name__ == "__main__":
    sys.exit(main())
