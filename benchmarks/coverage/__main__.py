"""Examine all model classes of transformers and write docs/coverage.md: ``python -m benchmarks.coverage``.

Each class is built in its full default configuration on the meta device, and every weight must be recognised. Then a
small instance with weights is built, and gradients verify its layouts.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from optimizer.partition import discover
from optimizer.partition.apply import has_heads
from optimizer.tools.verify import Verdict, verify

from .document import write
from .shrink import divisor, shrink

CLASSES = re.compile(r"For(CausalLM|MaskedLM|ConditionalGeneration|ImageClassification)$")
MOST = 60_000_000
"""Largest number of parameters of a small instance."""
PATIENCE = 60
"""Seconds that the verification of one instance may take."""


def class_names() -> list[str]:
    """Return the names of the installed transformers' classes that the sweep examines."""
    import transformers

    return [name for name in dir(transformers) if CLASSES.search(name) and not name.startswith("Auto")]


def examine(name: str) -> dict[str, Any]:
    """Examine one class and return the findings as JSON."""
    import transformers

    out: dict[str, Any] = {"class": name}
    cls = getattr(transformers, name)
    try:
        with torch.device("meta"):
            model = cls(cls.config_class())
    except BaseException as error:  # Missing libraries raise errors of any type.
        model, out["not_built"] = None, _line(error)
    small = None
    for options in _attempts():
        try:
            small = _instance(cls, **options)
            break
        except BaseException as error:
            out["not_small"] = _line(error)
    if small is not None:
        out.pop("not_small", None)
    examined = model if model is not None else small
    if examined is None:
        return out
    out.pop("not_built", None)
    try:
        anatomies = discover(examined)
    except ValueError as error:
        return {**out, "error": _line(error)}
    out["weights"] = sum(len(a.shape) >= 2 for a in anatomies.values())
    out["unknown"] = sorted(
        {
            re.sub(r"\.\d+\.", ".#.", n)
            for n, a in anatomies.items()
            if len(a.shape) >= 2 and not (a.recognised and has_heads(a))
        }
    )
    if small is not None:
        out.update(_proof(small))
    return out


def _give_up(signum: int, frame: Any) -> None:
    raise TimeoutError(f"no proof within {PATIENCE} s")


def _attempts() -> list[dict[str, Any]]:
    return [
        {"images": True},
        {"images": False},
        {"images": True, "least": 16},
        {"images": False, "by": 1},
        {"images": False, "by": 1, "layers": 4},
    ]


def _instance(cls: Any, *, images: bool, least: int = 8, by: int | None = None, layers: int = 2) -> Any:
    config = cls.config_class()
    shrink(config, by if by is not None else divisor(config, least), images=images, layers=layers)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters are too many to run")
    torch.manual_seed(0)
    return cls(config)


def _proof(model: Any) -> dict[str, Any]:
    """Verify a model's layouts from gradients and return the findings as JSON."""
    signal.alarm(PATIENCE)
    try:
        report = verify(model)
    except (ValueError, RuntimeError, TimeoutError) as error:
        return {"verify": _line(error), "proven": 0, "undecided": 0, "contradicted": []}
    finally:
        signal.alarm(0)
    return {
        "proven": len(report.of(Verdict.PROVEN)),
        "undecided": len(report.of(Verdict.UNDECIDED)),
        "undecided_names": sorted(
            {f"{re.sub(r'[.][0-9]+[.]', '.#.', f.name)}: {f.why}" for f in report.of(Verdict.UNDECIDED)}
        )[:12],
        "contradicted": [f"{f.name} {f.claim}: {f.why}" for f in report.contradicted],
        "ran": list(report.forwards),
    }


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def main() -> None:
    """Examine all classes and write the page, or, with --only, examine a few classes and print the findings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument("--json", type=Path, help="also write all findings as JSON")
    parser.add_argument("--only", nargs="*", help="examine only these classes and print the findings; write nothing")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _give_up)
    findings = []
    for name in arguments.only or class_names():
        start = time.perf_counter()
        findings.append(examine(name))
        print(
            name,
            {k: v for k, v in findings[-1].items() if k != "class"} if arguments.only else _short(findings[-1]),
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )
    if not arguments.only:
        write(findings, arguments.out, arguments.json)


def _short(row: dict[str, Any]) -> str:
    keys = ("not_built", "not_small", "error", "unknown", "contradicted", "proven", "undecided", "verify")
    return json.dumps({k: row[k] for k in keys if row.get(k)})


if __name__ == "__main__":
    main()
