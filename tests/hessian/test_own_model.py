"""Rules for a model of one's own: the AdamW run, the evidence, probing, and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from experiments.models import GPTConfig, build
from hessian import HessianOperator, MatrixOperator, dense
from hessian.__main__ import main
from hessian.own_model import NATS, Run, energies, evidence, predicted_cost, second_moments, unattainable
from hessian.parts import weight_parts
from hessian.probing import energy_inside
from optimizer import AdamMini, Role, Rules, Unit, partition
from tests.documents import llama, loss

SHORT = Run(steps=40, lr=1e-2, every=2)


def batches(count: int = 8) -> list[Tensor]:
    return list(torch.randint(0, 16, (count, 4, 9), generator=torch.Generator().manual_seed(0)))


def steep(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradients are clipped."""
    return 20 * loss(model, batch)


def few_batches() -> Iterator[Tensor]:
    """Data that cannot be begun anew, fewer than the steps."""
    yield from batches()


def test_second_moments_are_adams_averaged() -> None:
    model, given = llama(), batches(40)
    before = [p.detach().clone() for p in model.parameters()]
    moments, trained = second_moments(model, steep, given, SHORT)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    wanted = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    v, taken = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
    adamw = torch.optim.AdamW([
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ], betas=(0.9, 0.95))  # fmt: skip
    for step, batch in enumerate(given):
        steep(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = SHORT.rate(step)
        for name, p in model.named_parameters():
            v[name] = 0.95 * v[name] + 0.05 * p.grad.square()
        if step >= 4 and step % 2 == 0:
            taken += 1
            for name in wanted:
                wanted[name] += v[name].double() / (1 - 0.95 ** (step + 1))
        adamw.step()
        adamw.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(moments[name], wanted[name] / taken, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(trained.get_parameter(name), p)


def test_forms_that_fit_are_told_from_those_that_do_not() -> None:
    """v of one matrix is constant in rows, of another a product."""
    model = llama()
    rows = torch.rand(4096, generator=torch.Generator().manual_seed(1)).double() + 0.1
    moments = {}
    for name, p in model.named_parameters():
        if p.dim() == 2:
            r, c = rows[: p.shape[0], None], rows[100 : 100 + p.shape[1]]
            moments[name] = r.expand(p.shape).contiguous() if name.endswith("wo.weight") else r * c
    found = {(row.role, row.unit): row for row in evidence(model, moments)}
    assert found["ATTENTION_OUT", "OUT_NEURON"].jensen < 1e-12 < found["ATTENTION_OUT", "IN_NEURON"].jensen
    assert found["ATTENTION_OUT", "OUT_NEURON"].z > 6 > abs(found["ATTENTION_OUT", "IN_NEURON"].z)
    for role in ("MLP_IN", "QUERY"):
        assert found[role, "FACTORED"].jensen < 1e-12 < found[role, "OUT_NEURON"].jensen
        assert found[role, "FACTORED"].z > 6


def test_energy_inside_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    A = A + A.T
    ids = torch.arange(60) // 15
    A[ids[:, None] == ids] *= 3
    inside, whole = energy_inside(MatrixOperator(A), ids, probes=400)
    exact = A[ids[:, None] == ids].square().sum(), A.square().sum()
    for found, wanted in zip((inside, whole), exact, strict=True):
        assert abs(float(found.value - wanted)) < 4 * float(found.stderr) < 0.3 * float(wanted)
    assert inside.products == 800
    one, all_of_it = energy_inside(MatrixOperator(A), torch.zeros(60, dtype=torch.int64), probes=5)
    torch.testing.assert_close(one.value, all_of_it.value)


def test_energies_of_a_transposed_matrix() -> None:
    """transformers' Conv1D stores [inputs, outputs]; the blocks are those of the dense Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 4), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = (torch.randn(6, 4).double(), torch.arange(6) % 3)

    def value(module: nn.Module, given: Any) -> Tensor:
        return nn.functional.cross_entropy(module(given[0]), given[1])

    (part,) = [p for p in weight_parts(model) if p.name == "0.weight"]
    assert part.shape == (5, 4)
    H = dense(HessianOperator(model, value, {"0.weight": model[0].weight}, [batch])).square().reshape(4, 5, 4, 5)
    exact = {
        "OUT_NEURON": float(H.diagonal(dim1=1, dim2=3).sum() / H.sum()),
        "IN_NEURON": float(H.diagonal(dim1=0, dim2=2).sum() / H.sum()),
    }
    assert abs(exact["OUT_NEURON"] - exact["IN_NEURON"]) > 0.1
    for energy in energies(model, value, [batch], [part], probes=400):
        assert abs(energy.share - exact[energy.unit]) < 4 * energy.stderr < 0.2
        assert energy.by_size == pytest.approx(1 / 5 if energy.unit == "OUT_NEURON" else 1 / 4)


def test_predicted_cost_leaves_the_token_embedding_out() -> None:
    choices = {"QUERY": {"predicted_cost": 0.5}, "TOKEN_EMBEDDING": {"predicted_cost": 9.0}, "NORM": {"unit": "TENSOR"}}
    assert predicted_cost(choices) == tuple(0.5 * slope for slope in NATS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 30}, "steps=30 gives 5 second moments.*use steps=61"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"every": 0}, "every=0"),
    ],
)
def test_runs_that_measure_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**options)
    assert len(Run(steps=61).averaged()) >= 10


def test_data_and_losses_that_cannot_be_used_are_named() -> None:
    with pytest.raises(ValueError, match=r"ended after 0 of 40.*begun anew"):
        second_moments(llama(), loss, [], SHORT)
    with pytest.raises(ValueError, match="ended after 8 of 40"):
        second_moments(llama(), loss, iter(batches()), SHORT)
    with pytest.raises(ValueError, match="loss is nan at step 1; use a smaller lr"):
        second_moments(llama(), lambda m, b: loss(m, b) * float("nan"), batches(), SHORT)
    with pytest.raises(TypeError, match="the loss returned"):
        second_moments(llama(), lambda m, b: m(b), batches(), SHORT)


def test_the_command_writes_rules_that_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.json"
    here = "tests.hessian.test_own_model"
    arguments = ["derive", "tests.documents:llama", "--data", f"{here}:batches", "--steps", "61", "--out", str(out)]
    main([*arguments, "--probes", "2"])
    said = capsys.readouterr()
    assert "Predicted cost against AdamW: " in said.out and "Share of each matrix" in said.out
    assert "AdamW run" in said.err and "61/61" in said.err
    rules = Rules.load(out)
    assert rules.name == "mine" and rules.provenance["steps"] == 61
    assert {row["unit"] for row in rules.evidence["table"]} >= {"FACTORED", "TENSOR", "OUT_NEURON", "IN_NEURON"}
    AdamMini(llama(), rules=str(out))
    main([*arguments, "--without", "FACTORED"])
    assert "FACTORED" not in {unit.value for unit in Rules.load(out).units.values()}
    arguments[3] = f"{here}:few_batches"
    main(arguments)
    assert "61/61" in capsys.readouterr().err


def fused_gpt() -> nn.Module:
    return build(GPTConfig(vocab=16, block_size=16, n_embd=16, n_layer=1, n_head=2), 0)


def columns_for(role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make evidence in which one role's second moments are constant along columns, and all others' along rows."""

    def moments(model: nn.Module, *_: Any) -> tuple[dict[str, Tensor], nn.Module]:
        out = {}
        for part in weight_parts(model):
            rows, columns = part.shape
            v = torch.arange(1.0, rows + 1)[:, None].expand(part.shape) ** 2
            v = torch.arange(1.0, columns + 1).expand(part.shape) ** 2 if part.role is role else v
            whole = out.setdefault(part.parameter, torch.ones(model.get_parameter(part.parameter).shape))
            whole.view(-1)[part.index] = v
        return out, model

    monkeypatch.setattr("hessian.__main__.second_moments", moments)


def test_rules_are_those_that_fused_tensors_can_follow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, here = tmp_path / "mine.json", "tests.hessian.test_own_model"
    arguments = ["derive", f"{here}:fused_gpt", "--data", f"{here}:batches", "--without", "FACTORED", "--out", str(out)]
    columns_for(Role.MLP_OUT, monkeypatch)
    main(arguments)
    assert Rules.load(out)[Role.MLP_OUT] is Unit.IN_NEURON and "not possible" not in capsys.readouterr().out
    columns_for(Role.VALUE, monkeypatch)
    main(arguments)
    rules, said = Rules.load(out), capsys.readouterr().out
    assert rules[Role.QUERY] is Unit.OUT_NEURON and rules[Role.VALUE] is not Unit.IN_NEURON
    assert "VALUE: IN_NEURON (gap 0.000) is not possible in transformer.h.0.attn.c_attn.weight" in said
    assert not any(layout.note for layout in partition(fused_gpt(), rules).values())
    assert {"VALUE", "IN_NEURON"} <= {row[key] for row in rules.evidence["table"] for key in ("role", "unit")}
    assert rules.evidence["rule"]["without"] == ["FACTORED", "IN_NEURON for VALUE"]


def test_what_fused_tensors_cannot_share() -> None:
    model = fused_gpt()
    name = "transformer.h.0.attn.c_attn.weight"
    roles = (Role.QUERY, Role.KEY, Role.VALUE)
    assert unattainable(model, Rules("mine", dict.fromkeys(roles, Unit.IN_NEURON))) == {}
    assert unattainable(model, Rules("mine", {Role.VALUE: Unit.IN_NEURON})) == {Role.VALUE: name}
    assert unattainable(model, Rules("mine", {Role.VALUE: Unit.IN_NEURON, Role.KEY: Unit.FACTORED})) == {}
    assert Role.NORM in unattainable(model, Rules("mine", {Role.NORM: Unit.IN_NEURON}))  # a vector has no inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:model", "--data", "x:y"], "nowhere"),
        (["llama-3-8b", "--data", "x:y"], "has no weights"),
        (["tests.documents:llama", "--data", "tests.documents:nothing"], "--data"),
        (["tests.documents:llama", "--data", "tests.documents:PAGES"], "without --loss it must yield"),
        (["tests.documents:llama", "--data", "tests.hessian.test_own_model:batches", "--steps", "5"], "steps=5"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["derive", *arguments])
    said = capsys.readouterr().err
    assert raised.value.code == 2 and message in said and "Traceback" not in said
