"""``python -m experiments.studies.hessian_maps.ship out/hessian``: make a study's rules the shipped set ``derived``.

The shipped file keeps the choices and the candidates behind them, not the raw table: `make hessian` makes that anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from optimizer import Rules

SHIPPED = Path(__file__).resolve().parents[3] / "optimizer" / "partition" / "rules" / "derived.json"


def ship(study: Path, target: Path = SHIPPED) -> Path:
    """Write the rules of a finished study to ``target``, without their raw table."""
    rules = Rules.load(study / "rules.json")
    rules.evidence = {key: value for key, value in rules.evidence.items() if key != "table"}
    return rules.save(target)


if __name__ == "__main__":
    print(ship(Path(sys.argv[1])))
