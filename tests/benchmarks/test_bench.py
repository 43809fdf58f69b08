"""The bench's own arithmetic: allocations, state bytes, bars, and that files are written whole. No timing is judged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bars, optimizer_step, report, runs
from benchmarks.case import heat
from benchmarks.common import replace, summary
from benchmarks.contestants import BASELINE, CONTESTANTS, Contestant, add_peers, published, state_bytes
from benchmarks.memory import allocations
from benchmarks.models import build


def test_allocations_are_the_peak_of_what_lives_at_one_time() -> None:
    wide = torch.ones(1 << 16)
    held: list[torch.Tensor] = []

    def call() -> None:
        first = wide + 1
        held.append(wide * 2)
        del first
        held.append(wide * 3)

    found = allocations(call)
    assert found.largest == wide.nbytes
    assert 2 * wide.nbytes <= found.peak < 2.1 * wide.nbytes
    assert allocations(lambda: wide.add_(1)).peak < 64  # a scalar


def test_allocations_inside_an_operation_are_seen() -> None:
    narrow = torch.ones(1 << 16, dtype=torch.bfloat16)
    found = allocations(lambda: torch.linalg.vector_norm(narrow, dtype=torch.float32))
    assert found.largest == 2 * narrow.nbytes  # the reduction casts all of it, although its result is one number


def test_state_bytes_are_all_tensors_of_the_state() -> None:
    model = nn.Linear(10, 6)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 4 * 66 + 2 * 4


pytestmark = pytest.mark.xdist_group("a heat of the bench")


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """A heat of the smallest model, as a run of the bench with one case."""
    names = [BASELINE, "AdamMini fused", "AdamMini fused, int8 moment", "AdamMini eager", "adam-mini 1.1.1"]
    rows = heat("llama-1M", torch.float32, names, rounds=2)
    machine = {"processor": "any", "cores": 2, "torch": "2", "python": "3", "load_average": [0.0, 0.0, 0.0]}
    single = {"per_tensor": 1.0}
    return {
        "machine": machine, "machine_after": machine, "seconds": 60.0,
        "cases": {bars.MAIN_CASE: {"rows": rows, "machine": machine}},
        "overhead": {"n": 1, "AdamMini fused": single, "AdamW fused": single},
        "startup": {"import": {"n": 1, "torch_s": 1.0, "optimizer_s": 0.1},
                    "warm": {"n": 1, "first_s": 1.0}, "cold": {"n": 1, "first_s": 61.0}, "others_cores": 0.0},
    }  # fmt: skip


def test_a_heat_knows_state_and_traffic(small: dict[str, Any]) -> None:
    rows = small["cases"][bars.MAIN_CASE]["rows"]
    count = sum(p.numel() for p in build("llama-1M", torch.float32).parameters())
    assert all(rows[name]["parameters"] == count for name in rows if name != "copy")
    assert rows[BASELINE]["traffic_bytes_per_parameter"] == pytest.approx(28, abs=0.01)
    assert rows["AdamMini fused"]["traffic_bytes_per_parameter"] == pytest.approx(20, abs=0.1)
    assert rows["AdamMini fused, int8 moment"]["state_bytes_per_parameter"] < 1.2
    assert rows["adam-mini 1.1.1"]["peak_of_largest"] > 1 > rows["AdamMini eager"]["peak_of_largest"]


def test_a_refused_contestant_of_ours_ends_the_heat_and_a_peer_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module, name: str) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=-1.0)

    monkeypatch.setitem(CONTESTANTS, "AdamMini fused", Contestant(refuse, "fused", ours=True))
    with pytest.raises(RuntimeError, match=r"AdamMini fused on llama-1M: Invalid learning rate: -1"):
        heat("llama-1M", torch.float32, [BASELINE, "AdamMini fused"], rounds=1)
    monkeypatch.setitem(CONTESTANTS, "Adafactor", Contestant(refuse, "slow"))
    rows = heat("llama-1M", torch.float32, [BASELINE, "Adafactor"], rounds=1)
    assert rows["Adafactor"] == {"error": "ValueError: Invalid learning rate: -1.0"}


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"ratio": 0.78, "n": 25, "others_cores": 0.0}, "PASS"),
        ({"ratio": 0.79, "n": 25, "others_cores": None}, "FAIL"),
        ({"ratio": 0.70, "n": 24, "others_cores": 0.0}, "no verdict: 24 rounds, 25 wanted"),
        ({"ratio": 0.08, "n": 25, "others_cores": 1.3}, "no verdict: other processes took 1.3 cores"),
    ],
)
def test_times_get_a_verdict_where_they_mean_something(small: dict[str, Any], row: dict, verdict: str) -> None:
    results = copy.deepcopy(small)
    results["cases"][bars.MAIN_CASE]["rows"]["AdamMini fused"] |= row
    found = {v.bar.what: v for v in bars.verdicts(results)}
    assert found["fused, fp32, 45M Llama, against fused AdamW"].verdict == verdict
    assert found["first step of 32 layers, nothing compiled"].verdict == "FAIL"
    assert found["state per parameter, 100M Llama, int8"].verdict == "not in this run"


def test_the_ratio_is_the_median_of_ratios_within_rounds() -> None:
    table = summary({"a": [1.0, 10.0, 100.0], "b": [2.0, 5.0, 300.0]}, "a")
    assert table["b"]["ratio"] == 2.0
    assert table["b"]["median_s"] == 5.0


def test_the_report_is_built_from_the_files(small: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    folder, page = tmp_path / "results", tmp_path / "speed.md"
    replace(folder / "any-2-cores.json", json.dumps(small))
    other = copy.deepcopy(small)
    other["machine"]["processor"] = "Some(R) Other(TM) CPU @ 2.0GHz"
    replace(tmp_path / "run.json", json.dumps(other))
    added = ["--add", str(tmp_path / "run.json")]
    for arguments in (added, added, []):  # again: a run replaces its own processor's alone, and nothing is lost
        monkeypatch.setattr("sys.argv", ["report", "--results", str(folder), "--docs", str(page), *arguments])
        report.main()
        text = page.read_text()
        assert text.count("\n## ") == 2
        for title, name in (("any, 2 cores", "any-2-cores"),
                            ("Some(R) Other(TM) CPU @ 2.0GHz, 2 cores", "some-other-cpu-2-0ghz-2-cores")):  # fmt: skip
            section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
            assert f"Measured on {title}" in section and "| fused, fp32, 45M Llama, against fused AdamW |" in section
            assert f"({'../benchmarks/results/optimizer_step/'}{name}.md)" in section
            assert "| adam-mini 1.1.1 |" in (folder / f"{name}.md").read_text()
            assert 0 < (folder / f"{name}.png").stat().st_size < 200_000
    assert runs.load(folder / "any-2-cores.json") == small
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_run_of_another_machine_changes_nothing(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    replace(folder / "any-2-cores.json", json.dumps(small))
    other = copy.deepcopy(small)
    other["machine"]["processor"] = "another"
    replace(tmp_path / "good.json", json.dumps(other))
    replace(tmp_path / "bad.json", "{}")
    added = [str(tmp_path / "good.json"), str(tmp_path / "bad.json")]
    monkeypatch.setattr("sys.argv", ["report", "--results", str(folder), "--add", *added])
    with pytest.raises(SystemExit):
        report.main()
    assert "bad.json is damaged" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["any-2-cores.json"]


def test_every_bar_on_a_time_has_a_case_with_enough_rounds() -> None:
    """A bar on a case that the bench does not run, or runs too briefly, would never get a verdict."""
    cases = {case.name: case for case in optimizer_step.CASES}
    found = 0
    for bar in bars.BARS:
        for name in (bars.MAIN_CASE, bars.BF16_CASE, *bars.GPT2_CASES, *bars.STATE_CASES):
            for contestant in CONTESTANTS:
                results = {"cases": {name: {"rows": {contestant: {"ratio": 1.0, "n": 1, "others_cores": 0.0}}}}}
                try:
                    bar.value(results)
                except KeyError:
                    continue
                found += 1
                assert contestant in cases[name].contestants and cases[name].rounds >= bar.enough, bar.what
    assert found == sum(bar.enough == bars.ENOUGH for bar in bars.BARS)


def row(results: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = results["cases"][bars.MAIN_CASE]["rows"]["AdamMini fused"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: row(r).update(ratio=float("nan")), "AdamMini fused/ratio=nan"),
        (lambda r: row(r).update(ratio=float("-inf")), "ratio=-inf"),
        (lambda r: row(r).update(ratio=None), "ratio=None"),
        (lambda r: row(r).pop("n"), "'AdamMini fused' of the case .* has no n"),
        (lambda r: row(r).pop("others_cores"), "has no others_cores"),
        (lambda r: r["cases"][bars.MAIN_CASE].update(rows={}), "has no rows"),
        (lambda r: r["startup"]["cold"].update(first_s=None), "startup/cold/first_s=None"),
        (lambda r: r["cases"].clear(), "it has no case"),
        (lambda r: r.pop("overhead"), "it has no overhead"),
        (lambda r: r.pop("seconds"), "it has no seconds"),
    ],
)  # fmt: skip
def test_a_run_with_a_hole_gets_no_verdicts(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: Any, message: str,
) -> None:  # fmt: skip
    """A ratio of minus infinity passed its bar, and a row without its number of rounds counted as enough of them."""
    results = copy.deepcopy(small)
    change(results)
    replace(tmp_path / "any-2-cores.json", json.dumps(results))
    with pytest.raises(ValueError, match=rf"any-2-cores\.json is damaged .*{message}.*run `make bench` again"):
        runs.load(tmp_path / "any-2-cores.json")
    monkeypatch.setattr("sys.argv", ["report", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["any-2-cores.json"]


def test_no_run_or_a_cut_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "any-2-cores.json"
    with pytest.raises(FileNotFoundError, match=r"has no run; run `make bench`"):
        runs.load_all(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"any-2-cores\.json does not exist; run `make bench`"):
        runs.load(path)
    for text in ("", "[]", '{"cases": {', '{"seconds": 1, "seconds": 2}'):
        replace(path, text)
        with pytest.raises(ValueError, match=r"any-2-cores\.json is damaged .*run `make bench` again"):
            runs.load_all(tmp_path)


def test_a_system_that_does_not_say_who_else_ran_is_no_damage(small: dict[str, Any], tmp_path: Path) -> None:
    results = copy.deepcopy(small)
    results["cases"][bars.MAIN_CASE]["rows"]["AdamMini fused"]["others_cores"] = None
    replace(tmp_path / "any-2-cores.json", json.dumps(results))
    assert runs.load_all(tmp_path) == {"any-2-cores": results}


def test_peers_that_are_not_installed_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"torchao is missing: `make bench`"):
        add_peers(tmp_path)
    assert published().Adam_mini
