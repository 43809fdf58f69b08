"""The house: who may import whom, and that the library stands on torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.privates import reached

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_the_import_table_holds() -> None:
    result = run(str(Path(sys.executable).with_name("lint-imports")))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_a_forbidden_import_would_be_found(tmp_path: Path) -> None:
    """The contracts can fail: the same table over a tree in which hessian imports experiments."""
    rooms = ["interface", *(path.parent.name for path in (ROOT / "optimizer").glob("*/__init__.py"))]
    for package in (
        *("optimizer", "hessian", "experiments", "analysis", "paper_figures"),
        *(f"optimizer/{room}" for room in rooms),
    ):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "hessian" / "bad.py").write_text("import experiments\n")
    (tmp_path / "analysis" / "bad.py").write_text("import torch\n")
    deferred = "def late():\n    from ..wrappers import anything\n"
    (tmp_path / "optimizer" / "partition" / "bad.py").write_text(deferred)
    for name in ("adam_mini", "__main__"):
        (tmp_path / "optimizer" / f"{name}.py").write_text("")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    result = run(str(Path(sys.executable).with_name("lint-imports")), cwd=tmp_path)
    assert result.returncode != 0 and "3 broken" in result.stdout
    assert "optimizer.partition.bad -> optimizer.wrappers" in result.stdout.replace("\n", " ")


def test_no_file_takes_another_files_private_names() -> None:
    assert reached([*sorted((ROOT / "optimizer").rglob("*.py")), ROOT / "adam_mini.py"]) == []


def test_private_names_that_are_taken_would_be_found(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("class A:\n    def __init__(self):\n        self._x = 1\n    def _f(self): pass\n")
    other.write_text("from .one import _hidden\ndef g(a):\n    a._f()\n    a._x = a._foreign\n    return self._x\n")
    found = [line.split(" ", 1)[1] for line in reached([one, other])]
    assert found == ["from .one import _hidden", "a._x", "a._f"]


def test_optimizer_imports_torch_alone() -> None:
    """In a process of its own: nothing of numpy's, scipy's or transformers' is asked for."""
    code = (
        "import sys, builtins; real = builtins.__import__\n"
        "def guard(name, g=None, *a, **k):\n"
        "    who = (g or {}).get('__name__', '')\n"
        "    if who.split('.')[0] in ('optimizer', 'adam_mini') and not a[-1:] == (1,):\n"
        "        root = name.split('.')[0]\n"
        "        ok = root in sys.stdlib_module_names | {'torch', 'optimizer', 'adam_mini', ''} or (a and a[-1])\n"
        "        assert ok, name\n"
        "    return real(name, g, *a, **k)\n"
        "builtins.__import__ = guard\n"
        "import optimizer, adam_mini, optimizer.step.reference, optimizer.__main__\n"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
