"""The role study: its arms change one role, its runs pair, resume and leave nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import Corpus, batch_at
from experiments.models import build, lm_loss
from experiments.studies.role_study import __main__ as command
from experiments.studies.role_study import cells, choose, criteria, runs
from experiments.studies.role_study import probe as probing
from experiments.studies.role_study.cells import ADAMW, FIT, HELD_OUT, MODELS, TWIN, Cell
from optimizer import AdamMini, Role, Rules, Unit, partition
from optimizer.partition import discover

TEXT = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
CORPUS = Corpus(TEXT, TEXT[::-1].copy(), 256, "test")
CELL = Cell("gpt", "python-stdlib", 1e-2, 1)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of ten steps on a small text, and a study of two cells with two arms."""
    monkeypatch.setattr(runs, "STEPS", 10)
    monkeypatch.setattr(runs, "EVAL_BATCHES", 2)
    monkeypatch.setattr("experiments.data.load", lambda _: CORPUS)
    chosen = {ADAMW: Rules("elementwise"), "VALUE/TENSOR": cells.arms("gpt")["VALUE/TENSOR"]}
    monkeypatch.setattr(command, "arms", lambda _: chosen)
    monkeypatch.setattr(command, "cells", lambda: [CELL, Cell("gpt", "python-stdlib", 1e-2, 2)])


def test_split_projections_change_nothing_but_the_names() -> None:
    fused, split = build(MODELS["gpt"], 3), cells.make_model("gpt", 3)
    tokens = torch.randint(0, 256, (2, cells.LENGTH), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(split(tokens), fused(tokens), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in fused.parameters())
    query = partition(split, "adam_mini")["transformer.h.0.attn.c_attn.q_proj.weight"]
    assert query.n_blocks == MODELS["gpt"].n_head


@pytest.mark.parametrize("model", MODELS)
def test_an_arm_changes_its_role_alone(model: str) -> None:
    built, arms = cells.make_model(model, 0), cells.arms(model)
    anatomies, elementwise = discover(built), partition(built, "elementwise")
    assert len(arms) == {"llama": 40, "gpt": 44}[model]
    for arm, rules in arms.items():
        if "/" in arm:
            changed = {n for n, layout in partition(built, rules).items() if layout != elementwise[n]}
            role = Role(arm.split("/")[0])
            assert changed == {n for n, anatomy in anatomies.items() if anatomy.role is role}, arm


def test_an_arm_that_the_model_cannot_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "make_model", lambda name, seed: build(MODELS[name], seed))  # with fused projections
    with pytest.raises(ValueError, match=r"QUERY/.*leave it out"):
        cells.arms("gpt")


def test_the_deciding_cells_come_first() -> None:
    order = cells.cells()
    assert len(order) == len(set(order)) == 24
    assert {(c.model, c.data) for c in order[:12]} == {FIT, HELD_OUT}
    assert {c.seed for c in order[:4]} == {0}
    assert sum(len(cells.arms(c.model)) for c in order) == 1008


def test_runs_of_a_seed_pair_and_moments_are_adams(short: None) -> None:
    elementwise = Rules("elementwise")
    first, moments = runs.run(CELL, ADAMW, elementwise, CORPUS)
    again, _ = runs.run(CELL, ADAMW, elementwise, CORPUS)
    twin, none = runs.run(CELL, TWIN, elementwise, CORPUS)
    assert again["final_val_loss"] == first["final_val_loss"] and not none
    assert 0 < abs(twin["final_val_loss"] - first["final_val_loss"]) < 1e-5
    # The same second moments from torch's AdamW: after the warm-up of one step, only step 5 of ten is averaged.
    model = cells.make_model(CELL.model, CELL.seed)
    groups = [[p for p in model.parameters() if (p.dim() > 1) is decays] for decays in (True, False)]
    adamw = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], betas=runs.BETAS
    )
    for step in range(6):
        lm_loss(model, batch_at(TEXT, CELL.seed, step, runs.ROWS, runs.LENGTH)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = CELL.lr * min(step + 1, (10 - step) / 9)
        adamw.step()
        adamw.zero_grad()
    for name, p in model.named_parameters():
        expected = adamw.state[p]["exp_avg_sq"].double() / (1 - 0.95**6)
        torch.testing.assert_close(moments[name], expected, rtol=2e-3, atol=1e-10)


def test_a_stopped_study_resumes(short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    command.main(out, cache, dry_run=True)
    assert capsys.readouterr().out.startswith("4 runs, 4 left") and not out.exists()
    command.main(out, cache, minutes=0)
    assert not list(out.glob("*.json"))
    command.main(out, cache)
    path = out / f"{CELL.name}.json"
    before = json.loads(path.read_text())
    assert set(before["runs"]) == {ADAMW, "VALUE/TENSOR"} and (cache / f"{CELL.name}.npz").is_file()
    capsys.readouterr()
    command.main(out, cache, dry_run=True)
    assert capsys.readouterr().out.startswith("4 runs, 0 left")
    del before["runs"]["VALUE/TENSOR"]
    before["runs"][ADAMW]["seconds"] = -1
    path.write_text(json.dumps(before))
    command.main(out, cache)
    after = json.loads(path.read_text())
    assert set(after["runs"]) == {ADAMW, "VALUE/TENSOR"} and after["runs"][ADAMW]["seconds"] == -1, (
        "run only what lacks"
    )
    before["settings"]["steps"] = 11
    path.write_text(json.dumps(before))
    with pytest.raises(SystemExit):
        command.main(out, cache)
    assert "other settings" in capsys.readouterr().err


def test_criteria_of_known_moments() -> None:
    model = cells.make_model("llama", 0)
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for name, p in model.named_parameters():
        draws = [torch.randn(n, generator=generator, dtype=torch.float64).exp() for n in p.shape]
        moments[name] = draws[0][:, None] * draws[1] if p.dim() == 2 else draws[0]
    values = criteria.of_cell(Cell("llama", "enwik8", 1e-2, 0), moments)
    assert set(values) == {arm for arm in cells.arms("llama") if "/" in arm}
    index = {name: i for i, name in enumerate(criteria.CRITERIA)}
    for arm, row in values.items():
        assert len(row) == len(criteria.CRITERIA)
        zero = arm.endswith("/FACTORED")  # v has rank one, so nothing is lost, however v varies
        for name in ("jensen", "stein", "unexplained", "step_cost"):
            assert (row[index[name]] == pytest.approx(0, abs=1e-9)) is zero, (arm, name)
        tensors = [n for n, a in discover(model).items() if a.role.value == arm.split("/")[0]]
        share = sum(moments[n].numel() for n in tensors) / sum(v.numel() for v in moments.values())
        assert row[index["size"]] == pytest.approx(share)
        assert row[index["stein_sum"]] == pytest.approx(row[index["stein"]] * share)
    finer = Rules("elementwise").replace("rows", {Role.MLP_IN: Unit.OUT_NEURON})
    rows = sum(partition(model, finer)[n].n_blocks for n, a in discover(model).items() if a.role is Role.MLP_IN)
    assert values["MLP_IN/OUT_NEURON"][index["scalars"]] == pytest.approx(np.log(2 * 2 * 192 * 64 / rows))


def test_a_probe_of_nothing_costs_nothing_and_leaves_the_run_as_it_was(
    short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "STEPS", 10)
    monkeypatch.setattr(probing, "EVERY", 4)
    rules = {"VALUE/ELEMENT": Rules("elementwise"), "VALUE/TENSOR": cells.arms("gpt")["VALUE/TENSOR"]}
    monkeypatch.setattr(probing, "arms", lambda _: {ADAMW: Rules("elementwise"), **rules})
    alone = probing.probe(CELL, CORPUS)
    assert alone["VALUE/ELEMENT"] == pytest.approx(0, abs=1e-6) and abs(alone["VALUE/TENSOR"]) > 1e-5
    monkeypatch.setattr(probing, "arms", lambda _: {ADAMW: Rules("elementwise"), "VALUE/TENSOR": rules["VALUE/TENSOR"]})
    assert probing.probe(CELL, CORPUS)["VALUE/TENSOR"] == alone["VALUE/TENSOR"], "probes do not disturb the run"


def test_the_step_of_a_probe_is_the_one_that_sharing_takes(short: None) -> None:
    """From the first step on, AdamW's trajectory and that of sharing coincide, so both take the same second step."""
    parameters, optimizers = [], []
    for rules in (Rules("elementwise"), cells.arms("gpt")["VALUE/TENSOR"]):
        model = cells.make_model("gpt", 0)
        optimizer = AdamMini(model, 1e-2, runs.BETAS, weight_decay=0.1, rules=rules)
        lm_loss(model, batch_at(TEXT, 0, 0, runs.ROWS, runs.LENGTH)).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        parameters.append(dict(model.named_parameters()))
        optimizers.append(optimizer)
    layouts = partition(cells.make_model("gpt", 0), cells.arms("gpt")["VALUE/TENSOR"])
    values = [name for name in before if name.endswith("v_proj.weight")]
    adamw = {name: parameters[0][name].detach().clone() for name in values}
    with probing.shared_step(parameters[0], optimizers[0], before, {name: layouts[name] for name in values}):
        for name in values:
            torch.testing.assert_close(parameters[0][name], parameters[1][name], rtol=1e-3, atol=1e-6)
            assert not torch.allclose(parameters[0][name], adamw[name], rtol=1e-2, atol=1e-5)
    assert all(torch.equal(parameters[0][name], adamw[name]) for name in values)


def test_criteria_are_written_for_the_cells_that_have_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "probe", lambda cell, _: dict.fromkeys(cells.arms(cell.model), 0.5))
    monkeypatch.setattr(criteria, "load", lambda _: CORPUS)
    cell = cells.cells()[0]
    model = cells.make_model(cell.model, 0)
    moments = {n: torch.rand(p.shape, dtype=torch.float64) + 0.1 for n, p in model.named_parameters()}
    runs.save_moments(tmp_path, cell, moments)
    assert criteria.write(tmp_path, tmp_path) == 1
    document = json.loads((tmp_path / "criteria.json").read_text())
    assert document["columns"] == ["cell", "arm", *criteria.CRITERIA, "probe"] and len(document["rows"]) == 33
    assert {(row[0], row[-1]) for row in document["rows"]} == {(cell.name, 0.5)}
    monkeypatch.setattr(criteria, "probe", lambda *_: pytest.fail("a stored probe was computed again"))
    assert criteria.write(tmp_path, tmp_path) == 1


def _write_gaps(folder: Path, gap: Callable[[Cell, str], float | None]) -> Path:
    for cell in cells.cells():
        found = {arm: {"final_val_loss": None if (g := gap(cell, arm)) is None else 3.0 + g, "seconds": 1.0}
                 for arm in cells.arms(cell.model)}  # fmt: skip
        document = runs.load_cell(folder, cell)
        document["runs"] = found
        runs.save_cell(folder, cell, document)
    return folder


def test_a_role_gets_the_fewest_scalars_that_cost_nothing_in_any_pair(tmp_path: Path) -> None:
    """By hand: rows of the query cost 0.0009 everywhere, its heads 0.0011 in one pair only."""
    costs = {"QUERY/OUT_NEURON": 0.0009, "VALUE/TENSOR": -0.1, "bias_tensor": 0.002}

    def gap(cell: Cell, arm: str) -> float | None:
        if (cell.model, cell.data) == HELD_OUT or cell.lr == 1e-2:
            return None if arm != ADAMW else 0.0  # Nothing here may matter.
        if arm == "QUERY/ATTENTION_HEAD":
            return 0.0011 if cell.model == "gpt" else 0.0
        if arm == "KEY/FACTORED":
            return None if cell.seed == 2 else -1.0  # A divergence outweighs any mean.
        return costs.get(arm, 0.0 if arm in (ADAMW, TWIN) else 0.5)

    chosen = choose.choose(_write_gaps(tmp_path, gap))
    assert chosen[Role.QUERY] is Unit.OUT_NEURON and chosen[Role.VALUE] is Unit.TENSOR
    assert chosen[Role.KEY] is chosen[Role.BIAS] is chosen[Role.MLP_OUT] is chosen[Role.EXPERT_OUT] is Unit.ELEMENT
    assert chosen[Role.CONV] is Rules("factored")[Role.CONV]
    query = {c["unit"]: c for c in chosen.evidence["choices"]["QUERY"]["candidates"]}
    assert query["ATTENTION_HEAD"]["worst"] == 0.0011 and query["OUT_NEURON"]["scalars"] < query["FACTORED"]["scalars"]


def test_a_missing_run_is_named_before_rules_are_written(tmp_path: Path) -> None:
    folder = _write_gaps(tmp_path, lambda cell, arm: 0.0)
    cell = Cell(*FIT, 3e-3, 1)
    document = runs.load_cell(folder, cell)
    del document["runs"]["QUERY/FACTORED"]
    runs.save_cell(folder, cell, document)
    with pytest.raises(ValueError, match=r"llama-python-stdlib-0\.003-1 lacks the runs \['QUERY/FACTORED'\]"):
        choose.choose(folder)


def test_the_shipped_rules_are_those_that_the_stored_runs_choose() -> None:
    chosen, shipped = choose.choose(Path(__file__).parents[2] / "results" / "role_study"), Rules("derived")
    assert chosen == shipped and chosen.evidence == shipped.evidence
