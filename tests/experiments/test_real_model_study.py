"""The study of a real model on a tiny one: it resumes to the same numbers, and its model is the pinned one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.models import LlamaConfig, build
from experiments.studies.real_model.__main__ import run
from experiments.studies.real_model.blocks import heads, neurons, tokens
from experiments.studies.real_model.measure import KINDS
from experiments.studies.real_model.partitions import partitions
from experiments.studies.real_model.plan import Settings, plan
from experiments.studies.real_model.store import load
from experiments.studies.real_model.subject import Subject, layer_of
from hessian import dense
from hessian.own_model import Run

CONFIG = LlamaConfig(vocab=24, dim=8, n_layers=2, n_heads=2, n_kv_heads=1, hidden=6)
SETTINGS = Settings(
    tokens=6,
    model_samples=2,
    matrix_samples=1,
    column_probes=1,
    groups=3,
    slq_steps=3,
    slq_probes=2,
    run=Run(steps=11, lr=1e-3, every=1, warmup=0.0),
    rows=1,
    run_tokens=6,
    texts=(0,),
)


def subject(facts: str = "tiny") -> Subject:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 24, (2, 40), generator=generator)
    training = np.random.default_rng(0).integers(0, 20, 500)
    model = build(CONFIG, 0).eval()
    return Subject(model, lambda k, n: (text[k : k + 1, :n], text[k : k + 1, 1 : n + 1]), training, {"name": facts})


def samples(folder: Path) -> dict[str, list[dict[str, object]]]:
    return {path.stem: json.loads(path.read_text())["samples"] for path in folder.glob("*.json")}


def same(one: object, other: object) -> None:
    """Equal up to the rounding of float32: an operator's first products are computed in another way than later ones."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, float)) and not (isinstance(one, list) and one and isinstance(one[0], (list, str))):
        wanted = np.abs(np.asarray(other, dtype=float)).max(initial=0.0)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * wanted)
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


def test_a_stopped_study_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    """One run, and one that lost samples of some files and other files altogether."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(subject(), SETTINGS, whole) == []
    first = samples(whole)
    assert set(first) == {task.name for task in plan(subject(), SETTINGS)}
    assert {task.kind for task in plan(subject(), SETTINGS)} == set(KINDS)
    parts.mkdir()
    for path in whole.glob("*.json"):
        document = json.loads(path.read_text())
        if path.stem.startswith(("energy", "columns", "matrices", "moments-0")):
            document["samples"] = document["samples"][:-1] if path.stem != "moments-0" else document["samples"]
            (parts / path.name).write_text(json.dumps(document))
    left = run(subject(), SETTINGS, parts, minutes=0)
    assert len(left) == len(first) - 1, "everything but moments-0 lacks a sample"
    assert run(subject(), SETTINGS, parts) == []
    again = samples(parts)
    assert set(again) == set(first)
    for name, wanted in first.items():
        assert len(again[name]) == len(wanted), name
        for one, other in zip(again[name], wanted, strict=True):
            same(one, other)


def test_results_of_another_model_or_other_settings_are_refused(tmp_path: Path) -> None:
    (task,) = (t for t in plan(subject(), SETTINGS) if t.name == "columns-model-H-text0")
    run(subject(), SETTINGS, tmp_path, only=task.name)
    assert load(tmp_path, subject(), SETTINGS, task)["samples"]
    with pytest.raises(ValueError, match=r"columns-model-H-text0\.json has subject=.*tiny.*another.*move it away"):
        load(tmp_path, subject("another"), SETTINGS, task)
    with pytest.raises(ValueError, match=r"has settings=.*6.*5"):
        load(tmp_path, subject(), Settings(tokens=5, texts=(0,)), task)
    (tmp_path / f"{task.name}.json").write_text('{"samples": 3}')
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path, subject(), SETTINGS, task)


def test_numbers_are_those_of_the_dense_hessian() -> None:
    """One probe's norms of a layer's column, and the mean of a matrix's energies, from the exact Hessian."""
    tiny, (task, *_) = subject(), (t for t in plan(subject(), SETTINGS) if t.kind == "columns")
    prepared = KINDS["columns"][0](tiny, SETTINGS, task)
    names = list(tiny.layers())
    sizes = [tiny.model.get_parameter(name).numel() for name in names]
    matrix = dense(tiny.operator("H", tiny.text(0, 6), names))
    layers = prepared.facts["layers"]
    found = [prepared.sample(len(layers) * i + 1) for i in range(150)]
    assert {sample["layer"] for sample in found} == {layers[1]}
    inside = torch.tensor([layer_of(name) == layers[1] for name in names]).repeat_interleave(torch.tensor(sizes))
    exact = torch.stack([x.sum() for x in matrix[:, inside].double().square().sum(1).split(sizes)])
    mean = torch.tensor([sample["squares"] for sample in found]).double().mean(0)
    assert float((mean.sum() / exact.sum() - 1).abs()) < 0.15
    assert float((mean - exact).abs().max()) < 0.15 * float(exact.sum())


def test_partitions_are_what_their_names_say() -> None:
    tiny = subject()
    names = [n for n in tiny.layers() if layer_of(n) == "layer 1"] + ["output.weight"]
    found = partitions(tiny.model, names, control=0)
    query = tiny.model.get_parameter("layers.1.attention.wq.weight").shape
    assert list(names).index("layers.1.attention.wq.weight") == 0
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.stack([p.signs(generator) for _ in range(60)]) for name, p in found.items()}
    for name, signs in draws.items():
        same = (signs.float().T @ signs.float()) == 60  # the same sign in 60 draws: one block
        assert int(same.sum()) == sum(found[name].squares), name
        table = same[: query.numel(), : query.numel()].reshape(*query, *query)
        rows, columns = table[0, 0].any(1), table[0, 0].any(0)
        wanted = {"element": (1, 1), "row": (1, 8), "column": (8, 1), "head": (4, 8), "tensor": (8, 8), "layer": (8, 8)}
        if name in wanted:
            assert (int(rows.sum()), int(columns.sum())) == wanted[name], name


def test_blocks_of_maps() -> None:
    tiny = subject()
    of_heads = heads(tiny, "layer 0")
    assert of_heads.labels == [
        *("QUERY 0", "QUERY 1", "KEY 0", "VALUE 0"),
        *("ATTENTION_OUT 0", "ATTENTION_OUT 1"),
    ]
    out = of_heads.ids[-64:].reshape(8, 8)
    assert out[:, 0].tolist() == [4] * 8 and out[0].tolist() == [4] * 4 + [5] * 4, "heads are the columns of the output"
    of_neurons = neurons(tiny, "layer 0", 3)
    assert len(of_neurons.labels) == 9 and torch.bincount(of_neurons.ids).tolist() == [16] * 9
    with pytest.raises(ValueError, match="groups=4 does not divide the 6 neurons"):
        neurons(tiny, "layer 0", 4)
    of_tokens = tokens(tiny, 0, 6)
    present = set(torch.cat([part.flatten() for part in tiny.text(0, 6)]).tolist())
    rows = of_tokens.ids.reshape(24, 8)[:, 0]
    assert {token for token in range(24) if rows[token] < 2} == present
    assert set(rows.tolist()) == set(range(8))
