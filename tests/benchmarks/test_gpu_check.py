"""The GPU check on a machine without one: it refuses, and no outcome but a complete one on a CUDA device passes.

The checks themselves run here on the CPU, in which they must pass and still not give a verdict.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import correctness, speed, verdict, work
from benchmarks.gpu_check.verdict import FAILED, INCOMPLETE, NOT_RUN, PASSED, Check, Evidence, Outcome
from optimizer import AdamMini, Layout
from optimizer.step.reference import initial_state, reference_step

CPU = torch.device("cpu")
FAST = ("gradient scale and skipped step", "int8 first moment", "bf16 with compensated sums", "gradient release",
        "offload of the state", "offload of state and gradients", "training, fp32")  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(restored_threads: None) -> None:
    torch.set_num_threads(1)


def everything(device: str = "cuda:0", **changed: Any) -> list[Outcome]:
    """An outcome for each check that exists, as a complete run on a GPU would have them."""
    return [Outcome(name, PASSED, (device,)) for name in command.names()]


# -------------------------------------------------------------------------------------------------- the verdict


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "page.md")]) == 2
    said = capsys.readouterr().err
    assert "sees no CUDA device, so nothing was checked" in said and "make setup TORCH=" in said
    assert not list(tmp_path.iterdir())


def test_only_a_complete_run_on_cuda_passes() -> None:
    assert verdict.verdict(everything(), command.names()) == (PASSED, [])
    assert [verdict.EXIT_CODES[state] for state in (PASSED, FAILED, INCOMPLETE)] == [0, 1, 3]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_passing_elsewhere_is_incomplete(device: str) -> None:
    state, reasons = verdict.verdict(everything(device), command.names())
    assert state == INCOMPLETE and len(reasons) == len(command.names())
    assert f"ran on {device}, which is no cuda device" in reasons[0]


def test_each_missing_check_is_incomplete() -> None:
    for i, name in enumerate(command.names()):
        outcomes = everything()
        del outcomes[i]
        assert verdict.verdict(outcomes, command.names()) == (INCOMPLETE, [f"{name}: {NOT_RUN}"])
    assert verdict.verdict([], [])[0] == INCOMPLETE


def test_a_check_that_did_not_run_or_saw_no_device_is_incomplete() -> None:
    for last in (
        Outcome("x", NOT_RUN, note="no Triton"),
        Outcome("x", PASSED),
        Outcome("x", PASSED, ("cuda:0", "cpu")),
    ):
        assert verdict.verdict([*everything(), last], [*command.names(), "x"])[0] == INCOMPLETE


def test_a_failure_outweighs_what_is_missing() -> None:
    state, reasons = verdict.verdict(
        [Outcome("x", FAILED, ("cuda:0",), "off by 2"), *everything()[3:]], command.names()
    )
    assert (state, reasons) == (FAILED, ["x: off by 2"])


def test_a_check_that_computed_elsewhere_or_recorded_nothing_fails() -> None:
    def on_cpu(device: torch.device) -> Evidence:
        evidence = Evidence()
        evidence.saw([torch.zeros(2), torch.zeros(2, device="meta")])
        return evidence

    found = verdict.outcome_of(Check("x", on_cpu), torch.device("meta"))
    assert (found.state, found.devices) == (FAILED, ("cpu", "meta")) and "computed on cpu" in found.note
    assert verdict.outcome_of(Check("x", lambda device: Evidence()), CPU).state == FAILED


# ------------------------------------------------------------------------------------- the checks, on the CPU


def test_a_page_of_a_cpu_is_incomplete(tmp_path: Path) -> None:
    everywhere = (*correctness.CHECKS, *work.CHECKS)
    chosen = [check for check in everywhere if check.name in (*FAST, "Triton, fp32", "step captured in a CUDA graph")]
    assert len(chosen) == len(FAST) + 2
    assert command.check(tmp_path / "page.md", CPU, chosen) == 3
    document = json.loads((tmp_path / "page.json").read_text())
    states = {check["name"]: check for check in document["checks"]}
    assert all(states[name]["state"] == PASSED and states[name]["devices"] == ["cpu"] for name in FAST), states
    assert states["Triton, fp32"]["state"] == states["step captured in a CUDA graph"]["state"] == NOT_RUN
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# GPU check: INCOMPLETE\n") and "- Triton, fp32: NOT RUN" in text
    assert f"- torch: {torch.__version__}" in text and "- commit: " in text
    assert "- foreach, fp32: NOT RUN" in text  # a check that was left out


def test_a_wrong_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer whose weight decay is off by a thousandth of the weights: the page says FAILED, and exits with 1."""
    right = AdamMini.step

    def wrong(self: AdamMini, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.999)
        return right(self, closure)

    monkeypatch.setattr(AdamMini, "step", wrong)
    monkeypatch.setattr(correctness, "RULES", ("adam_mini",))
    (check,) = (c for c in correctness.CHECKS if c.name == "eager, fp32")
    assert command.check(tmp_path / "page.md", CPU, [check]) == 1
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# GPU check: FAILED") and "x allowed" in page and "correctness.py:" in page


@pytest.mark.parametrize("rules", ["adam_mini", "elementwise", "factored"])
def test_steps_are_compared_with_the_reference(rules: str) -> None:
    for dtype in ("fp32", "bf16"):
        for subject in correctness.subjects(CPU, correctness.DTYPES[dtype]).values():
            evidence = Evidence()
            assert correctness.compare(subject, dtype, evidence, rules=rules) <= 1
            assert evidence.devices == {"cpu"}


def test_the_reference_of_many_blocks_is_the_papers_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    layout, shape = Layout(0, [2, 1, 3]), (6, 5)
    ids = layout.block_ids(shape)
    p = torch.randn(shape, generator=generator, dtype=torch.float64)
    states, numbers = [initial_state(p, ids) for _ in range(2)], {"lr": 0.1, "beta1": 0.9, "beta2": 0.95}
    loop, sums = p, p
    for _ in range(3):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        loop = reference_step(loop, g, states[0], ids, eps=1e-8, weight_decay=0.1, **numbers)
        sums = correctness.many_blocks_step(sums, g, states[1], ids, eps=1e-8, weight_decay=0.1, **numbers)
    torch.testing.assert_close(sums, loop, rtol=1e-14, atol=1e-14)


def test_times_are_interleaved_and_beside_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "MODELS", {"Llama": correctness.LLAMA})
    monkeypatch.setattr(speed, "WARM_UP", 1)
    rows: list[speed.Row] = []
    checks = speed.checks(rows, 3)
    assert [verdict.outcome_of(check, CPU).state for check in checks] == [PASSED] * 2
    assert [row.contestant for row in rows] == 2 * list(speed.CONTESTANTS)
    assert all(row.n == 3 and row.median_ms > 0 for row in rows) and rows[0].ratio == 1
    half, full = rows[1].state_mib, rows[0].state_mib
    assert half == pytest.approx(full / 2, rel=0.1)
    assert verdict.outcome_of(checks[0], torch.device("meta")).state == NOT_RUN
