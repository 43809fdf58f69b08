"""``python -m benchmarks.scaling``: write docs/scaling.md's tables; ``--check`` counts real collectives instead."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common import replace, write

from .check import report
from .document import by_rules, compute, merged, tables


def main() -> int:
    """Write the tables, or check the simulator; the exit status is the number of cases that are off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs/scaling.md"), help="page whose tables are written")
    parser.add_argument("--check", action="store_true", help="count the collectives of small models on gloo ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="for --check")
    parser.add_argument("--zero", action="store_true", help="with --check: ZeRO 1 to 3 (DeepSpeed is needed)")
    arguments = parser.parse_args()
    if arguments.check:
        return report(arguments.ranks, arguments.zero)
    found, rules = compute(), by_rules()
    replace(arguments.docs, merged(arguments.docs.read_text(encoding="utf-8"), tables(found, rules)))
    write("scaling", {"models": found, "rules": rules})
    return 0


if __name__ == "__main__":
    sys.exit(main())
