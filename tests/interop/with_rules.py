"""Runs a script as it stands, with other rules: ``python -m tests.interop.with_rules RULES SCRIPT arguments``.

The default of ``AdamMini``'s argument ``rules`` is replaced, and nothing else. SCRIPT is a path, or a module as
``-m name``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from optimizer import AdamMini

if __name__ == "__main__":
    _, rules, *sys.argv = sys.argv
    defaults = AdamMini.__init__.__kwdefaults__
    assert defaults is not None and "rules" in defaults
    defaults["rules"] = rules
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
