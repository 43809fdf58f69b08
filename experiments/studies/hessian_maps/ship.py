"""Make a study's rules the shipped set ``derived_blocks``.

    python -m experiments.studies.hessian_maps.ship out/hessian

The shipped file contains the choices and their candidates, but not the raw table of evidence, which ``make hessian``
computes again.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments.commandline import refusals
from experiments.storage import read_json
from optimizer import Rules

SHIPPED = Path(__file__).resolve().parents[3] / "optimizer" / "partition" / "rules" / "derived_blocks.json"


def ship(study: Path, target: Path = SHIPPED) -> Path:
    """Write the rules of a finished study to ``target``, without the raw table of evidence, and return its path.

    Raises:
        FileNotFoundError: the study has no rules.
        ValueError: the study was not finished, or its report does not match its rules.
    """
    rules, path = Rules.load(study / "rules.json"), study / "report.json"
    report = read_json(path)
    if report is None:
        raise ValueError(f"study={study} is not finished: {path} does not exist; run `make hessian` to its end first")
    derived = report.get("rules") if isinstance(report, dict) else None
    units = derived.get("units") if isinstance(derived, dict) else None
    if units != {role.value: unit.value for role, unit in rules.units.items()}:
        raise ValueError(f"study={study}: {path} is of other rules than its rules.json; run `make hessian` to its end")
    if not isinstance(rules.evidence, dict):
        raise ValueError(f"study={study}: rules.json has no evidence; run `make hessian` to its end")
    rules.evidence = {key: value for key, value in rules.evidence.items() if key != "table"}
    rules.name = target.stem
    return rules.save(target)


def main(study: tyro.conf.Positional[Path]) -> None:
    """Make the rules of a study the shipped set ``derived_blocks``.

    Args:
        study: folder of a finished study.
    """
    with refusals(ValueError, OSError):
        written = ship(study)
    print(written)


if __name__ == "__main__":
    tyro.cli(main)
