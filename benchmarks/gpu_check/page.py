"""The page of a check, in Markdown, and its JSON."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.speed import BASELINE, Row
from benchmarks.gpu_check.verdict import Outcome

ROOT = Path(__file__).resolve().parents[2]


def _said(*command: str) -> str:
    """Return what a command says, or "unknown" if it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 and result.stdout.strip() else "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the device, the driver, the versions and the commit."""
    cuda = device.type == "cuda"
    commit, changed = _said("git", "rev-parse", "HEAD"), _said("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{device} ({platform.processor() or 'no name'})",
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "none",
        "memory": f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB" if cuda else "none",
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "Triton": _triton_version(),
        "Python": platform.python_version(),
        "commit": commit + ("" if changed == "unknown" else ", with changed files"),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def document(
    state: str, reasons: Sequence[str], outcomes: Sequence[Outcome], rows: Sequence[Row], about: dict[str, Any]
) -> dict[str, Any]:
    """Return everything on the page as JSON."""
    return {
        "verdict": state,
        "reasons": list(reasons),
        "machine": about,
        "checks": [dataclasses.asdict(outcome) for outcome in outcomes],
        "speed": [dataclasses.asdict(row) for row in rows],
    }


def markdown(page: dict[str, Any]) -> str:
    """Write a document as Markdown."""
    lines = [f"# GPU check: {page['verdict']}", ""]
    lines += [f"- {reason}" for reason in page["reasons"]] + [""] * bool(page["reasons"])
    lines += [*(f"- {key}: {value}" for key, value in page["machine"].items()), "", "## Checks", ""]
    lines += ["| check | outcome | computed on | seconds | |", "|:--|:--|:--|--:|:--|"]
    for check in page["checks"]:
        note, where = check["note"].replace("|", "/"), ", ".join(check["devices"]) or "nothing"
        lines.append(f"| {check['name']} | {check['state']} | {where} | {check['seconds']:.1f} | {note} |")
    if page["speed"]:
        lines += ["", "## Time and memory of a step", ""]
        lines += [
            f"Interleaved rounds; medians with quartiles. The ratio is the median of those to {BASELINE} in the same "
            "round. Peak is what a step allocates and frees.",
            "",
            "| shapes | dtype | optimizer | ms | quartiles | n | ratio | state MiB | peak MiB |",
            "|:--|:--|:--|--:|:--|--:|--:|--:|--:|",
        ]
        lines += [
            f"| {r['model']} | {r['dtype']} | {r['contestant']} | {r['median_ms']:.3f} | "
            f"{r['q1_ms']:.3f} to {r['q3_ms']:.3f} | {r['n']} | {r['ratio']:.2f} | {r['state_mib']:.1f} | "
            f"{r['peak_mib']:.1f} |"
            for r in page["speed"]
        ]
    return "\n".join(lines) + "\n"
