"""The study of the paper's Hessian experiments: its parts run, resume, and agree with answers that are known."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis.paper_hessian import quadratics as statistics
from experiments.data import fashion
from experiments.models import build
from experiments.studies.paper_hessian import __main__ as command
from experiments.studies.paper_hessian import classes, descent, leave_out, numbers, problems, spectra
from experiments.studies.paper_hessian.descent import Sharing
from experiments.studies.paper_hessian.store import Cell, Part, rounded
from hessian import HessianOperator, block_norms
from optimizer import AdamMini, Role, Rules, Unit
from paper_figures.paper_hessian.__main__ import DRAW
from paper_figures.paper_hessian.__main__ import main as draw

# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper_hessian")
    command.main(folder / "out", folder / "cache", profile="smoke")
    return folder


def test_every_cell_has_a_result_and_none_runs_again(
    smoke: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = command.parts("smoke", smoke / "cache")
    for part in parts:
        document = json.loads((smoke / "out" / f"{part.name}.json").read_text())
        assert list(document["cells"]) == [cell.name for cell in part.cells]
    monkeypatch.setattr(Part, "run_one", lambda *_: pytest.fail("a finished cell runs again"))
    command.main(smoke / "out", smoke / "cache", profile="smoke")
    assert capsys.readouterr().out.startswith("0 of ")


def test_figures_and_tables_of_a_smoke_run(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics.verdict, "__defaults__", (20,))
    draw(["--results", str(smoke / "out"), "--out", str(smoke / "figures")])
    assert len(list((smoke / "figures").glob("*.png"))) == len(DRAW)
    text = (smoke / "figures" / "paper_hessian.md").read_text()
    assert "The winner `" in text and " nan" not in text and "inf " not in text


def test_the_plan_lists_the_minutes_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(tmp_path / "out", tmp_path / "cache", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and "classes: 60 of 60 cells left" in lines[4] and "minutes on one core" in lines[-1]
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="only=\\['clases'\\] is unknown"):
        command.main(tmp_path / "out", tmp_path / "cache", only=("clases",))


def test_an_interrupted_part_resumes_and_other_settings_are_refused(tmp_path: Path) -> None:
    ran: list[str] = []

    def cell(name: str) -> Cell:
        return Cell(name, 1.0, lambda: ran.append(name) or {"x": 1 / 3, "y": math.inf})

    part = Part("p", {"n": 1}, [cell("a"), cell("b")])
    part.run_one(tmp_path, part.cells[0])
    assert [c.name for c in part.waiting(tmp_path)] == ["b"] and ran == ["a"]
    assert part.load(tmp_path)["cells"]["a"]["result"] == {"x": 0.33333, "y": None}
    with pytest.raises(ValueError, match="other settings"):
        dataclasses.replace(part, settings={"n": 2}).waiting(tmp_path)
    (tmp_path / "p.json").write_text('{"cells": 1}')
    with pytest.raises(ValueError, match="has no cells"):
        part.waiting(tmp_path)
    assert rounded({"t": (1, True, 123456.7)}) == {"t": [1, True, 123460.0]}


# ------------------------------------------------------------------------------------------------------- quadratics


class Quadratic(nn.Module):
    """A matrix whose name gives it the role MLP_OUT."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.down_proj = nn.Linear(start.shape[1], start.shape[0], bias=False, dtype=start.dtype)
        self.down_proj.weight = nn.Parameter(start.clone())


@pytest.mark.parametrize(
    ("unit", "sharing"),
    [
        (Unit.ELEMENT, Sharing("adamw", 12)),
        (Unit.TENSOR, Sharing("one")),
        (Unit.OUT_NEURON, Sharing("row", 3)),
        (Unit.IN_NEURON, Sharing("column", shape=(3, 4), by_column=True)),
        (Unit.FACTORED, Sharing("factored", shape=(3, 4))),
    ],
)
def test_descent_takes_the_steps_of_the_optimizer(unit: Unit, sharing: Sharing) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = problems.with_spectrum(problems.log_uniform(12, 50.0, generator), problems.rotation(12, 0.5, generator))
    start = torch.randn(12, generator=generator, dtype=torch.float64)
    model = Quadratic(start.view(3, 4))
    rules = Rules("elementwise").replace("test", {Role.MLP_OUT: unit})
    optimizer = AdamMini(model, 0.1, (0.9, 0.95), eps=descent.EPS, weight_decay=0.0, rules=rules)
    first, steps = float(start @ matrix @ start), 7
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        x = model.down_proj.weight.flatten()
        (0.5 * x @ matrix @ x).backward()
        optimizer.step()
        optimizer.zero_grad()
    end = model.down_proj.weight.detach().flatten()
    found = descent.descend(
        matrix[None], start[None, :, None], sharing, torch.tensor([0.1], dtype=torch.float64), steps, (0.9, 0.95)
    )
    assert float(found[0, 0]) == pytest.approx(float(end @ matrix @ end) / first, rel=2e-4)


def test_starts_are_averaged_and_curves_end_at_the_end() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.diag(torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64))[None]
    starts = problems.starts_at(3, generator)[None]
    rates = torch.tensor([0.05, 0.3], dtype=torch.float64)
    together = descent.descend(matrix, starts, Sharing("one"), rates, 20, (0.9, 0.95))
    alone = [descent.descend(matrix, starts[:, :, [i]], Sharing("one"), rates, 20, (0.9, 0.95)) for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone).mean(0))
    curve = descent.descend(matrix, starts, Sharing("one"), rates, 20, (0.9, 0.95), curve=True)
    assert curve.shape == (1, 2, 21) and torch.equal(curve[:, :, -1], together) and bool((curve[:, :, 0] == 1).all())


def test_steps_to_a_tolerance() -> None:
    """With no momentum, AdamW needs far fewer steps than one scalar on a diagonal; budgets bound what is found."""
    matrix = torch.diag(10.0 ** -torch.linspace(0, 3, 6, dtype=torch.float64))[None]
    starts = problems.starts_at(6, torch.Generator().manual_seed(0))[None]
    rates = 2.0 ** torch.arange(-8, 5, dtype=torch.float64)
    budgets = [8, 16, 32, 64]
    adamw, one = (
        descent.steps_to(matrix, starts, s, rates, (0.0, 0.95), 1e-3, budgets)[0]
        for s in (Sharing("adamw", 6), Sharing("one"))
    )
    assert adamw.steps is not None and adamw.steps < 16 and adamw.inside
    assert one.steps is None or one.steps > 2 * adamw.steps
    never = descent.steps_to(matrix, starts, Sharing("one"), rates, (0.0, 0.95), 1e-12, [8])[0]
    assert never.steps is None and not never.inside
    edge = descent.steps_to(matrix, starts, Sharing("adamw", 6), rates[:2], (0.0, 0.95), 0.99, budgets)[0]
    assert edge.steps is not None and not edge.inside


def test_spectra_and_eigenvectors_of_the_problems() -> None:
    generator = torch.Generator().manual_seed(0)
    values = problems.log_uniform(10, 1000.0, generator)
    assert float(values.min()) == pytest.approx(1e-3) and float(values.max()) == 1
    for vectors in (
        problems.rotation(10, 0.0, generator),
        problems.rotation(10, 3.0, generator),
        problems.reflections(10, 2, generator),
        problems.plane_rotations(10, generator),
    ):
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(10, dtype=torch.float64))
        found = torch.linalg.eigvalsh(problems.with_spectrum(values, vectors))
        torch.testing.assert_close(found, values.sort().values)
    assert torch.equal(problems.rotation(10, 0.0, generator), torch.eye(10, dtype=torch.float64))
    held = problems.held_out_problems(0)
    assert len({p.kind for p in held}) == 7 and len(held) == 56
    assert all(float(torch.linalg.eigvalsh(p.matrix)[0]) > 0 for p in held)
    assert len({p.seed for p in held}) == 56 and {p.blocks for p in held} == {1, 4}


def test_numbers_of_known_blocks() -> None:
    diagonal = torch.diag(torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64))
    found = numbers.of_block(diagonal, 1e-4)
    for name in ("gain", "adam_gain", "kappa"):
        assert found[name] == pytest.approx(2)
    assert found["diagonality"] == 1 and found["size"] == pytest.approx(math.log(3))
    assert found["jensen_diagonal"] == pytest.approx(math.log(1.11 / 3) - math.log(0.1))
    assert found["jensen_v"] == pytest.approx(math.log(1.0101 / 3) - math.log(0.01))
    round_one = numbers.of_block(torch.eye(3, dtype=torch.float64), 1e-4)
    assert all(round_one[name] == pytest.approx(0) for name in numbers.NAMES if name not in ("diagonality", "size"))
    problem = problems.Problem("x", "x", torch.block_diag(torch.eye(3).double(), diagonal), torch.ones(6, 4), blocks=2)
    assert numbers.of_problem(problem, 1e-4)["gain"] == pytest.approx(2)


def test_closed_form_steps_are_those_of_gradient_descent() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = problems.with_spectrum(problems.log_uniform(8, 100.0, generator), problems.rotation(8, 0.4, generator))
    for denominators in (torch.ones(8, dtype=torch.float64), matrix.diagonal()):
        expected = numbers.descent_steps(matrix, denominators, 1e-2)
        top = torch.linalg.eigvalsh(numbers.scaled(matrix, denominators))[-1]
        total, count = torch.zeros(2000, dtype=torch.float64), 400
        energy = 0.0
        for _ in range(count):
            start = torch.randn(8, generator=generator, dtype=torch.float64)
            curve = descent.gradient_descent(matrix, start, (1 / (top * denominators))[:, None], 1999)[0]
            first = float(0.5 * start @ matrix @ start)
            total, energy = total + first * curve, energy + first
        steps = int((total / energy <= 1e-2).nonzero()[0])
        assert steps == pytest.approx(expected, rel=0.1, abs=2.1)


# ------------------------------------------------------------------------------------------------------- classifiers


def test_class_blocks_agree_with_probes_and_with_algebra() -> None:
    settings = classes.PROFILES["smoke"]
    model = classes.Classifier(6, 4, 5, 5, 0)
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(64, 6, generator=generator, dtype=torch.float64), torch.arange(64) % 5)
    named = dict(model.named_parameters())
    operator = HessianOperator(model, classes.loss_of("cross-entropy"), {"some": named["some"]}, [batch])
    probed = block_norms(operator, torch.arange(20) // 4, probes=400, seed=0).mean
    exact = classes.ratios(torch.stack([operator @ e for e in torch.eye(20, dtype=torch.float64)]), 5)
    inside = torch.eye(5, dtype=torch.bool)
    assert float(probed[~inside].mean() / probed[inside].mean()) == pytest.approx(exact["off_diagonal_square"], rel=0.1)
    found = classes.measure(settings, "mse", 8, 0)
    assert found["output"] == {"off_diagonal_square": 0.0, "diagonal_off_absolute": math.inf}
    assert 0 < found["hidden"]["off_diagonal_square"] < 1 and "whole" in found
    assert "whole" not in classes.measure(settings, "mse", 16, 0)


def test_the_hidden_layer_of_squared_error_by_algebra() -> None:
    """H between units i and j is v_i . v_j times the mean of x x^T over examples at which both are active."""
    model, generator = classes.Classifier(3, 2, 4, 4, 0), torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    first = dict(model.named_parameters())["first"]
    operator = HessianOperator(model, classes.loss_of("mse"), {"first": first}, [(x, torch.arange(32) % 4)])
    active, output = (x @ first.T > 0).double(), model.some
    for i in range(2):
        for j in range(2):
            block = (output[:, i] @ output[:, j]) * torch.einsum("n,na,nb->ab", active[:, i] * active[:, j], x, x) / 32
            unit = torch.eye(6, dtype=torch.float64)[3 * j : 3 * j + 3]
            found = torch.stack([operator @ e for e in unit], dim=1)[3 * i : 3 * i + 3]
            torch.testing.assert_close(found, block.detach())


def test_ratios_of_blocks_by_hand() -> None:
    matrix = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 0.0], [2.0, 0.0, 4.0]], dtype=torch.float64)
    found = classes.of_blocks(matrix, [2, 1])
    assert found["off_diagonal_square"] == pytest.approx(4 / ((9 + 1 + 1 + 9 + 16) / 2))
    assert found["diagonal_off_absolute"] == pytest.approx((12 / 5) / (4 / 4))


# ----------------------------------------------------------------------------------------------------- leave-one-out


def test_a_control_with_factor_one_is_adamw() -> None:
    settings = leave_out.PROFILES["smoke"]
    base = leave_out.train(settings, 0, ())
    (name, index, _), *_ = leave_out.choose(settings, "matrix", 0)
    same = leave_out.train(settings, 0, [leave_out.LeftOut(name, index, 1.0, leave_out.KINDS[1])])
    assert same["reported"] == pytest.approx(base["reported"], abs=1e-6)
    with pytest.raises(ValueError, match="needs moments"):
        leave_out.train(settings, 0, [leave_out.LeftOut(name, index, 1.0, leave_out.KINDS[0])])


@pytest.mark.parametrize("kind", leave_out.KINDS)
def test_only_the_left_out_elements_leave_adamw(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(leave_out.PROFILES["smoke"], steps=1)
    ends: list[dict[str, Tensor]] = []
    models: list[nn.Module] = []

    def kept(config: object, seed: int) -> nn.Module:
        models.append(build(config, seed))
        return models[-1]

    monkeypatch.setattr(leave_out, "build", kept)
    (name, index, _), *_ = leave_out.choose(settings, "block", 0)
    ones = {n: torch.ones(p.shape) for n, p in models[0].named_parameters()}
    for left in ((), (leave_out.LeftOut(name, index, 3.0, kind),)):
        leave_out.train(settings, 0, left, ones)
        ends.append({n: p.detach().clone() for n, p in models[-1].named_parameters()})
    start = dict(build(leave_out.config(settings), 0).named_parameters())
    for n, end in ends[1].items():
        changed = (end != ends[0][n]).flatten().nonzero()[:, 0]
        assert torch.equal(changed, index) if n == name else not len(changed)
    before = start[name].detach().flatten()[index]
    step = before * (1 - settings.lr * leave_out.WEIGHT_DECAY) - ends[1][name].flatten()[index]
    if kind == leave_out.KINDS[1]:  # AdamW's first step is lr times a sign
        torch.testing.assert_close(step.abs(), torch.full_like(step, 3 * settings.lr), rtol=1e-3, atol=1e-6)
    else:  # one rate: v = 1 gives lr times the gradient, whose norm was clipped to 1
        assert 0 < float(step.norm()) < 3 * settings.lr
        assert float(step.abs().std() / step.abs().mean()) > 0.05, "the step is not that of signs"


def test_blocks_are_those_of_the_partition_and_matrices_are_whole() -> None:
    settings = leave_out.PROFILES["full"]
    for level, most in (("block", settings.dim * 12), ("matrix", 256 * settings.dim)):
        chosen = leave_out.choose(settings, level, 1)
        assert len({name for name, _, _ in chosen}) == 3
        assert all(0 < len(index) <= most for _, index, _ in chosen)
    names = [[name for name, _, _ in leave_out.choose(settings, level, 1)] for level in leave_out.LEVELS]
    assert names[0] == names[1], "both levels leave out the same matrices"


# --------------------------------------------------------------------------------------------------- spectra, images


def test_block_spectra_are_those_of_the_hessian() -> None:
    settings = spectra.PROFILES["smoke"]
    model, draw_batch, measured = spectra.subject(settings, "cnn", 0)
    found = spectra.block_spectra(model, measured)
    assert set(found) == {"convolutions.0.weight", "convolutions.1.weight", "head.weight"}
    weight, images = model.head.weight, measured[0].double()
    double = spectra.subject(settings, "cnn", 0)[0].double()
    features = double.convolutions[1](nn.functional.relu(double.convolutions[0](images[:, None]))).relu()
    pooled = nn.functional.avg_pool2d(features, 2).mean((2, 3)).detach()

    def loss(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(pooled @ w.T + double.head.bias.detach(), measured[1])

    exact = torch.autograd.functional.hessian(loss, weight.detach().double()).reshape(weight.numel(), -1)
    torch.testing.assert_close(found["head.weight"], torch.linalg.eigvalsh(exact), rtol=1e-5, atol=1e-9)
    again, other_batch, _ = spectra.subject(settings, "cnn", 0)
    assert torch.equal(again.head.weight, weight) and torch.equal(draw_batch(3)[0], other_batch(3)[0])
    assert not torch.equal(draw_batch(3)[0], draw_batch(4)[0])


def test_fashion_mnist_is_read_from_the_packages_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    monkeypatch.setattr(fashion, "folders", lambda: [tmp_path / "nothing", folder])
    fashion.fashion_mnist.cache_clear()
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion.fashion_mnist()
    hashes = {}
    for name, array in (("train-images-idx3", images), ("train-labels-idx1", np.array([7, 1], dtype=np.uint8))):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        content = header + array.tobytes()
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(content))
        hashes[name.removesuffix("-idx3").removesuffix("-idx1")] = hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match="is pinned; unpack the package dataset-fashion-mnist again"):
        fashion.fashion_mnist()
    monkeypatch.setattr(fashion, "SHA256", hashes)
    found = fashion.fashion_mnist()
    assert np.array_equal(found[0], images) and found[1].tolist() == [7, 1]
    fashion.fashion_mnist.cache_clear()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 2, 3, 4)))
    with pytest.raises(ValueError, match="is no idx file"):
        fashion.fashion_mnist()
