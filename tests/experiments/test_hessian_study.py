"""The way of `make hessian` on tiny sizes: what it leaves, that it finds its stages again, and what it refuses.

The numbers inside are held by the tests of ``hessian``; these see wiring: parts of fused matrices cut at the wrong
place, a stage that is served although its inputs changed, a page that still needs the network.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.models import GPTConfig, LlamaConfig, build
from experiments.studies.hessian_maps import cache as cache_module
from experiments.studies.hessian_maps.__main__ import run
from experiments.studies.hessian_maps.cache import StageCache
from experiments.studies.hessian_maps.measure import coarse_blocks
from experiments.studies.hessian_maps.progress import StageBar
from experiments.studies.hessian_maps.settings import subjects
from hessian.parts import weight_parts
from optimizer import AdamMini, Rules
from paper_figures.style import draw_matrix, plt, save, setup, webp

LLAMA = LlamaConfig(vocab=8, dim=16, n_layers=1, n_heads=4, n_kv_heads=2, hidden=8)
GPT = GPTConfig(vocab=8, block_size=8, n_embd=16, n_layer=1, n_head=4)


SUBJECTS = {
    "gpt": GPTConfig(vocab=8, block_size=8, n_embd=4, n_layer=1, n_head=2),
    "llama": LlamaConfig(vocab=8, dim=4, n_layers=1, n_heads=2, n_kv_heads=1, hidden=8),
    "mlp": subjects("smoke")["mlp"],
}
"""The models of the smoke profile at half their width: an exact Hessian is a product for every parameter."""

shares_the_study = pytest.mark.xdist_group("hessian study")


class Recording(StageBar):
    """The bar of the study, and every line that it has shown."""

    SHOWN: ClassVar[list[str]] = []

    def __call__(self, done: int, total: int, what: str) -> None:
        super().__call__(done, total, what)
        assert 0 <= done <= total == self.bar.total and done == self.bar.n
        self.SHOWN.append(self.bar.desc.strip())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a study that has ended."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.studies.hessian_maps.__main__.subjects", lambda profile: SUBJECTS)
        # Tracing a product takes longer than all products of such a small model; tests/hessian compares both ways.
        patch.setattr("hessian.operators.LINEARISE_AFTER", 10**9)
        with patch.context() as recording:
            recording.setattr("experiments.studies.hessian_maps.progress.StageBar", Recording)
            run(out, "smoke")
        torch.set_num_threads(threads)
        yield out


# ---------------------------------------------------------------------------------------------- the whole way


@shares_the_study
def test_report_covers_every_model_unit_and_checkpoint(study: Path) -> None:
    rows = json.loads((study / "report.json").read_text())["evidence"]
    assert {row["model"] for row in rows} == {"gpt", "llama", "mlp"}
    assert {row["checkpoint"] for row in rows} == {0.0, 0.5, 1.0}
    for model in ("gpt", "llama"):
        units = {(row["role"], row["unit"]) for row in rows if row["model"] == model}
        assert {("QUERY", "ATTENTION_HEAD"), ("KEY", "ATTENTION_HEAD"), ("VALUE", "OUT_NEURON")} <= units
        assert {("MLP_IN", "IN_NEURON"), ("MLP_OUT", "OUT_NEURON"), ("HEAD", "TOKEN")} <= units
        assert {("TOKEN_EMBEDDING", "TOKEN"), ("ATTENTION_OUT", "IN_NEURON"), ("MLP_IN", "FACTORED")} <= units
    tensors = [row for row in rows if row["unit"] == "TENSOR"]
    assert all(row["z"] == 0 and row["n_blocks"] == 1 for row in tensors)


@shares_the_study
def test_derived_rules_train(study: Path) -> None:
    rules = Rules.load(study / "rules.json")
    assert rules.evidence["table"] and {"gpt", "llama"} == {row["model"] for row in rules.evidence["table"]}
    model = build(LLAMA, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamMini(model, lr=1e-2, rules=str(study / "rules.json"))
    model(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@shares_the_study
def test_repeating_computes_nothing(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (study / "data").glob("*.npz")}
    assert len(before) == 3 * 4 + 2 * 3 * 2  # training and three checkpoints of three models; two models x arms x seeds

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a stage was computed again")

    monkeypatch.setattr("experiments.studies.hessian_maps.__main__.measure", never)
    monkeypatch.setattr("experiments.studies.hessian_maps.subjects.Subject.train", never)
    run(study, "smoke")
    assert {path: path.stat().st_mtime_ns for path in (study / "data").glob("*.npz")} == before


@shares_the_study
def test_page_is_whole_and_needs_no_network(study: Path) -> None:
    command = [sys.executable, "-m", "paper_figures.hessian", str(study)]
    done = subprocess.run(command, cwd=Path(cache_module.__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = {path.stem for path in (study / "figures").glob("*.png")}
    assert len(drawn) >= 8 and drawn == {path.stem for path in (study / "figures").glob("*.pdf")}
    page = (study / "index.html").read_text()
    pictures = re.findall(r"data:image/(\w+);base64,([^\"]+)\"", page)
    assert [kind for kind, _ in pictures] == ["webp"] * len(drawn)
    sizes = {Image.open(path).size for path in (study / "figures").glob("*.png")}
    assert {Image.open(io.BytesIO(base64.b64decode(data))).size for _, data in pictures} == sizes
    outside = re.findall(r"(?:src|href)=\"(?!data:|#)([^\"]*)\"", page)
    assert not [link for link in outside if link.startswith(("http", "//"))]
    assert "QUERY" in (study / "summary.md").read_text().upper()


def test_a_picture_of_noise_takes_a_quarter_of_its_png(tmp_path: Path) -> None:
    """Noise is the worst case: the eleven pictures of the full study take 2 MB, and 8.6 MB as PNG."""
    setup()
    generator = np.random.default_rng(0)
    figure, grid = plt.subplots(4, 3, figsize=(8.6, 11.2))
    for axes in grid.flat:
        draw_matrix(axes, np.abs(generator.standard_normal((256, 256))) ** 3, [64, 128, 192], "noise")
    path = save(figure, tmp_path, "noise")
    small = webp(path)
    assert len(small) < path.stat().st_size / 4
    before, after = (np.asarray(Image.open(f).convert("L"), float) for f in (path, io.BytesIO(small)))
    assert np.abs(before - after).mean() < 8  # of 255


# --------------------------------------------------------------------------------------------------- coarse blocks


@pytest.mark.parametrize("config", [GPT, LLAMA])
def test_coarse_blocks_cover_every_parameter(config: GPTConfig | LlamaConfig) -> None:
    model = build(config, 0)
    ids, labels = coarse_blocks(model)
    assert len(ids) == sum(p.numel() for p in model.parameters())
    assert torch.equal(ids.unique(), torch.arange(len(labels)))
    assert len(set(labels)) == len(labels)


# ---------------------------------------------------------------------------------------------------- cache


class _Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {
            "x": np.arange(50_000, dtype=np.float64),
            "noise": np.random.default_rng(0).standard_normal(500).round(2),
        }


def test_stage_is_computed_once_per_inputs(tmp_path: Path) -> None:
    compute = _Counting()
    for inputs in ([1], [1], [2]):
        assert StageCache(tmp_path).get("stage", inputs, compute)["x"].sum() == 50_000 * 49_999 / 2
    assert compute.calls == 2


def test_changed_code_computes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = _Counting()
    StageCache(tmp_path).get("stage", [1], compute)
    monkeypatch.setattr(cache_module, "code_fingerprint", lambda: "other")
    StageCache(tmp_path).get("stage", [1], compute)
    assert compute.calls == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "zeroed"])
def test_damaged_stage_is_computed_again(tmp_path: Path, damage: str) -> None:
    compute = _Counting()
    StageCache(tmp_path).get("stage", [1], compute)
    (path,) = (tmp_path / "data").glob("*.npz")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    spoiled = {
        "cut": content[:middle],
        "empty": b"",
        "zeroed": content[:middle] + bytes(64) + content[middle + 64 :],  # ends in a wrong checksum
    }
    path.write_bytes(spoiled[damage])
    assert StageCache(tmp_path).get("stage", [1], compute)["x"][-1] == 49_999
    assert compute.calls == 2


def test_bytes_overwritten_anywhere_never_reach_the_caller(tmp_path: Path) -> None:
    # Some end in a wrong checksum, some inside the decompressor, each with an exception of its own.
    generator = np.random.default_rng(0)
    wanted = generator.standard_normal(3000).round(2)
    StageCache(tmp_path).get("stage", [1], lambda: {"x": wanted})
    (path,) = (tmp_path / "data").glob("*.npz")
    content = path.read_bytes()
    cache = StageCache(tmp_path)
    for start in generator.integers(0, len(content) - 16, 30):
        path.write_bytes(content[:start] + generator.bytes(16) + content[start + 16 :])
        assert np.array_equal(cache.get("stage", [1], lambda: {"x": wanted})["x"], wanted)


def test_interrupted_study_goes_on_after_its_last_stage(tmp_path: Path) -> None:
    first, cache = _Counting(), StageCache(tmp_path)
    cache.get("first", [1], first)

    def killed() -> dict[str, np.ndarray]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get("second", [1], killed)
    again = StageCache(tmp_path)
    again.get("first", [1], first)
    second = _Counting()
    again.get("second", [1], second)
    assert (first.calls, second.calls) == (1, 1)


def test_prune_keeps_what_was_used(tmp_path: Path) -> None:
    StageCache(tmp_path).get("stage", ["old"], _Counting())
    cache = StageCache(tmp_path)
    cache.get("stage", ["new"], _Counting())
    cache.prune()
    assert [path.name for path in (tmp_path / "data").glob("*.npz")] == list(cache.used.values())


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot be written"):
        StageCache(tmp_path / "file")


def test_other_format_version_is_refused(tmp_path: Path) -> None:
    StageCache(tmp_path)
    (tmp_path / "data" / "format.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match=r"99.*choose another --out"):
        StageCache(tmp_path)


# ------------------------------------------------------------------------------------------------- progress


@shares_the_study
def test_progress_names_the_model_its_state_and_every_matrix(study: Path) -> None:
    """A bar that only says "hessian-gpt-50" leaves minutes unexplained."""
    shown = Recording.SHOWN
    for name, config in SUBJECTS.items():
        assert f"{name}: training" in shown
        for percent in ("0%", "50%", "100%"):
            where = f"{name} at {percent} of training"
            assert f"{where}: exact Hessian, by columns" in shown
            for part in weight_parts(build(config, 0)):
                size = f"{part.shape[0]} x {part.shape[1]}"
                assert f"{where}: structure of {part.name} {size}" in shown
        assert f"{name} at 100% of training: whole model, block norms from probes" in shown
    assert "llama with rules derived, seed 1: training" in shown
