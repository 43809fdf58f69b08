"""The house: who may import whom, what the wheel holds, and that the library stands on torch alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_the_import_table_holds() -> None:
    result = run(str(Path(sys.executable).with_name("lint-imports")))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_a_forbidden_import_would_be_found(tmp_path: Path) -> None:
    """The contracts can fail: the same table over a tree in which hessian imports experiments."""
    for package in ("optimizer", "hessian", "experiments", "analysis", "paper_figures"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "hessian" / "bad.py").write_text("import experiments\n")
    (tmp_path / "analysis" / "bad.py").write_text("import torch\n")
    for name in ("adam_mini", "update", "reference"):
        (tmp_path / "optimizer" / f"{name}.py").write_text("")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    result = run(str(Path(sys.executable).with_name("lint-imports")), cwd=tmp_path)
    assert result.returncode != 0 and "2 broken" in result.stdout


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


@pytest.mark.timeout(280)
def test_the_wheel_holds_the_library_and_nothing_else(tmp_path: Path) -> None:
    result = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT))
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("adam_mini_lab-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"optimizer", "hessian", "adam_mini.py"}
    assert "optimizer/partition/rules/adam_mini.json" in names
    assert "optimizer/step/engines/native/kernel.cpp" in names
    assert "optimizer/partition/rules/schema/rules.schema.json" in names
    assert "optimizer/tools/configs/llama-3-8b.json" in names
    metadata = next(n for n in names if n.endswith("METADATA"))
    required = [
        line
        for line in zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert required == ["Requires-Dist: torch>=2.6"]
