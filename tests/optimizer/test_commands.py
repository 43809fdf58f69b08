"""The shell's side of every command: a bad value is one line and code 2, an error of the user's own is his traceback.

What the commands say of models is held elsewhere; these see a traceback where a line would do, and a line where only
a traceback can say which line of the user's file was wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimizer.__main__ import main
from optimizer.tools.targets import UserCodeError, load_target, resolve

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tests.optimizer.models:Llama"


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimizer", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with the user's modules."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def value():\n    return helper()\n"
        "def helper():\n    raise ValueError('width must be even')\n"
        "def absent():\n    open('/no/such/weights.pt')\n"
        "def lacking():\n    import a_package_nobody_has\n"
        "def wrong():\n    return torch.nn.Linear(2, 2).nope\n"
    )
    (tmp_path / "broken.py").write_text("def make():\n    return 1\nmake().weight\n")
    (tmp_path / "needy.py").write_text("import a_package_nobody_has\n")
    return tmp_path


@pytest.mark.parametrize(
    ("target", "last", "line"),
    [
        ("mine:value", "ValueError: width must be even", "in helper"),
        ("mine:absent", "No such file or directory: '/no/such/weights.pt'", "in absent"),
        ("mine:lacking", "No module named 'a_package_nobody_has'", "in lacking"),
        ("mine:wrong", "'Linear' object has no attribute 'nope'", "in wrong"),
        ("broken:make", "'int' object has no attribute 'weight'", 'broken.py", line 3'),
        ("needy:make", "No module named 'a_package_nobody_has'", 'needy.py", line 1'),
    ],
)
def test_an_error_of_the_users_own_keeps_its_traceback(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, last: str, line: str
) -> None:
    monkeypatch.syspath_prepend(str(mine))
    monkeypatch.delitem(sys.modules, target.partition(":")[0], raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["explain", target])
    assert ended.value.code == 1
    users_traceback(capsys.readouterr().err, target, last, line)
    monkeypatch.delitem(sys.modules, target.partition(":")[0], raising=False)


def test_an_error_of_the_users_own_keeps_its_traceback_in_a_shell(mine: Path) -> None:
    done = shell(mine, "explain", "mine:value")
    assert done.returncode == 1
    users_traceback(done.stderr, "mine:value", "ValueError: width must be even", "in helper")


def users_traceback(stderr: str, target: str, last: str, line: str) -> None:
    """The user's frames and error are shown, those of the command are not."""
    assert "Traceback (most recent call last)" in stderr and line in stderr and last in stderr
    assert stderr.splitlines()[-1].startswith(f"error: target '{target}' ")
    assert "targets.py" not in stderr and "importlib" not in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "mine:value"], ["verify", "mine:value"], ["verify", MODEL, "--inputs", "mine:value"],
        ["convert", "in.pt", "out.pt", "--model", "mine:value"],
    ],
)  # fmt: skip
def test_every_command_shows_it(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.syspath_prepend(str(mine))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "in helper" in said and "ValueError: width must be even" in said
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "no_such_module:make"], "target 'no_such_module:make' cannot be imported"),
        (["explain", "tests.optimizer.no_such:make"], "No module named 'tests.optimizer.no_such'"),
        (["explain", "tests.optimizer.models:Lama"], "has no attribute 'Lama'"),
        (["explain", MODEL, "--rules", "adam_minni"], "adam_minni"),
        (["plan", "nonsense"], "target 'nonsense' must be written module:attribute"),
        (["verify", MODEL, "--inputs", "nonsense"], "inputs 'nonsense' must be written module:attribute"),
        (["verify", MODEL, "--inputs", "json:loads"], "inputs 'json:loads' cannot be called without arguments"),
        (["convert", "DIR/none.pt", "DIR/out.pt", "--model", MODEL], "none.pt"),
    ],
)
def test_a_bad_value_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([argument.replace("DIR", str(tmp_path)) for argument in arguments])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert words in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_from_a_shell_the_line_is_said_once(tmp_path: Path) -> None:
    done = shell(tmp_path, "explain", "nonsense")
    assert done.returncode == 2 and done.stderr.count("'nonsense'") == 1 and "Traceback" not in done.stderr


def test_who_calls_from_python_has_the_error_as_the_cause(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine))
    for module in ("mine", "needy"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UserCodeError, match="width must be even") as error:
        load_target("mine:value")
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(UserCodeError) as error:
        resolve("needy:make", "target")
    assert isinstance(error.value.__cause__, ModuleNotFoundError)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
