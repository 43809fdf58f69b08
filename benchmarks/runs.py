"""Runs of the benchmark: one JSON file per processor, and the checks that a run is complete."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.documents import damaged, is_finite, read_object
from benchmarks.common import RESULTS

RUNS = RESULTS / "optimizer_step"
COPY = "copy"
TIMING = ("median_s", "q1_s", "q3_s", "ratio", "n", "gb_per_s")
FACTS = ("parameters", "state_bytes_per_parameter", "largest_temporary_of_largest", "peak_of_largest", "peak_of_group")


def file_name(machine: Mapping[str, Any]) -> str:
    """Return the name of the file of a machine's run, without a suffix: its processor and number of cores.

    Args:
        machine: the result of ``common.machine``.
    """
    words = re.sub(r"\((r|tm)\)", "", f"{machine['processor']} {machine['cores']} cores", flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", words.lower()))


def load(path: Path) -> dict[str, Any]:
    """Load a run of the benchmark and check that it is complete, because a null or a NaN would get a verdict, too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged; the message names what is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `make bench`, or give the file of a run with --add")
    results = read_object(path, "run `make bench` again")
    if why := _hole(results) or _odd_number("", results):
        raise damaged(path, why, "run `make bench` again")
    return results


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Load the runs of all processors: name of the file without its suffix -> run.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: a file is damaged; the message names what is missing.
    """
    runs = {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
    if not runs:
        raise FileNotFoundError(f"{folder} has no run; run `make bench`, or give its folder with --results")
    return runs


def _hole(results: dict[str, Any]) -> str:
    """Describe the first thing that the report needs and the results lack; return "" if they are complete."""
    for key in ("machine", "machine_after", "cases", "overhead", "startup"):
        if not isinstance(results.get(key), dict):
            return f"it has no {key}"
    if "seconds" not in results or not results["cases"]:
        return "it has no seconds" if "seconds" not in results else "it has no case"
    for key in ("processor", "cores", "torch", "python", "load_average"):
        if key not in results["machine"]:
            return f"machine has no {key}"
    for name, case in results["cases"].items():
        rows = case.get("rows") if isinstance(case, dict) else None
        if not isinstance(rows, dict) or not rows:
            return f"the case {name!r} has no rows"
        for contestant, row in rows.items():
            keys = TIMING if contestant == COPY else (*TIMING, *FACTS, "others_cores")
            if not isinstance(row, dict) or ("error" not in row and (missing := [k for k in keys if k not in row])):
                first = missing[0] if isinstance(row, dict) else "numbers"
                return f"{contestant!r} of the case {name!r} has no {first}"
    return ""


def _odd_number(where: str, value: Any) -> str:
    """Describe the first null or non-finite number in a value of the document; return "" if there is none."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if why := _odd_number(f"{where}/{key}" if where else str(key), child):
            return why
    unknown = value is None and where.endswith("others_cores")  # null on systems without /proc/stat
    if (value is None or isinstance(value, float)) and not (is_finite(value) or unknown):
        return f"{where}={value!r} is no finite number"
    return ""
