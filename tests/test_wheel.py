"""The wheel in an empty virtual environment in which torch and what torch requires are all there is."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.documents import ROOT, all_blocks

pytestmark = pytest.mark.xdist_group("wheel")  # it is built once

TRAIN = """
import torch

torch.manual_seed(0)
nn = torch.nn
model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11))
tokens = torch.arange(11)
loss = torch.nn.functional.cross_entropy(model(tokens), tokens.roll(-1))
loss.backward()
before = [parameter.detach().clone() for parameter in model.parameters()]
"""
CHECK = """
assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
assert torch.nn.functional.cross_entropy(model(tokens), tokens.roll(-1)) < loss
"""


def test_it_holds_the_library_and_nothing_else(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"optimizer", "hessian", "adam_mini.py"}
    assert "optimizer/partition/rules/adam_mini.json" in names
    assert "optimizer/step/engines/native/kernel.cpp" in names
    assert "optimizer/partition/rules/schema/rules.schema.json" in names
    assert "optimizer/tools/configs/llama-3-8b.json" in names
    metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode().splitlines()
    required = [line for line in metadata if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.6"]


def test_the_readme_names_its_file(wheel: Path) -> None:
    assert f"pip install dist/{wheel.name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def what_torch_requires() -> list[importlib.metadata.Distribution]:
    """torch and everything that it requires, as far as it is installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    names = ["torch"]
    while names:
        name = names.pop()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            assert name != "torch"
            continue
        requirements = [Requirement(text) for text in found[name].requires or []]
        names += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return list(found.values())


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with the wheel. Nothing is downloaded.

    torch and its requirements are symbolic links to those of this environment, in a folder that a .pth file names.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    interpreter = folder / "venv" / "bin" / "python"
    linked = folder / "torch_and_its_requirements"
    linked.mkdir()
    for distribution in what_torch_requires():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = linked / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    command = [
        sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-index", "--no-deps", "-q",
        str(wheel),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(f"{linked}\n")
    return interpreter


def run(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in the environment, away from the repository and from every variable that leads to it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [python, "-I", "-c", code], cwd=python.parent, env=environment, capture_output=True, text=True, timeout=240
    )


def test_only_torch_is_there(python: Path) -> None:
    code = (
        "import importlib.util, optimizer, sys\n"
        "assert optimizer.__file__.startswith(sys.prefix), optimizer.__file__\n"
        "print([name for name in ('numpy', 'scipy', 'transformers', 'experiments', 'pytest') "
        "if importlib.util.find_spec(name)])"
    )
    result = run(python, code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_three_lines_of_the_readme_train(python: Path) -> None:
    (block,) = [b for b in all_blocks() if b.page == "README.md" and b.language == "python"]
    assert "optimizer.step()" in block.text
    result = run(python, TRAIN + block.text + CHECK)
    assert result.returncode == 0, result.stderr


def test_a_step_that_moves_nothing_would_be_found(python: Path) -> None:
    result = run(python, TRAIN + CHECK)
    assert result.returncode != 0 and "AssertionError" in result.stderr


def test_the_published_package_s_class_trains(python: Path) -> None:
    lines = (
        "from adam_mini import Adam_mini\n"
        "optimizer = Adam_mini(named_parameters=model.named_parameters(), lr=1e-2, dim=8, n_heads=2)\n"
        "optimizer.step()\n"
    )
    result = run(python, TRAIN + lines + CHECK)
    assert result.returncode == 0, result.stderr
