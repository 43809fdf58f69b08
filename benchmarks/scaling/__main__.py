"""Write the tables of docs/scaling.md, or count real collectives with ``--check``: ``python -m benchmarks.scaling``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common import replace, write

from .check import report
from .document import by_rules, compute, merged, tables


def main() -> int:
    """Write the tables, or check the simulator; return the number of cases in which it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs/scaling.md"), help="page whose tables are written")
    parser.add_argument("--check", action="store_true", help="count the collectives of small models on gloo ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks for --check")
    parser.add_argument("--zero", action="store_true", help="with --check: check ZeRO 1 to 3, which needs DeepSpeed")
    arguments = parser.parse_args()
    if arguments.check:
        return report(arguments.ranks, arguments.zero)
    models, rules = compute(), by_rules()
    replace(arguments.docs, merged(arguments.docs.read_text(encoding="utf-8"), tables(models, rules)))
    write("scaling", {"models": models, "rules": rules})
    return 0


if __name__ == "__main__":
    sys.exit(main())
