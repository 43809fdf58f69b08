"""Micro-batches give the whole batch's loss and gradient, alone and under DDP and FSDP2; bf16; compiled blocks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import passes
from experiments.configs import TrainConfig
from experiments.data import batch_at, load
from experiments.models import GPTConfig, build
from experiments.storage import read_json
from experiments.train import Options, Refused, run_folder, train
from tests.experiments import ranks

GPT = GPTConfig(block_size=32, n_embd=32, n_layer=2, n_head=2)


def whole(config: TrainConfig, rows: int = 0, *, recompute: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a batch on one process."""
    model = build(config.model, 0)
    model.recompute = recompute
    batch = batch_at(load(config.data).train, 0, 0, config.batch, config.seq_len)
    loss = passes.backward(model, batch, rows=rows)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def require_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float = 1e-6) -> None:
    """Relative error of each gradient as a whole: elements near zero have no digits of their own."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(config: TrainConfig, rows: int) -> None:
    """Three rows leave a last piece of one, which weighs a quarter and not a half."""
    (loss, gradients), (one, wanted) = whole(config, rows), whole(config)
    assert loss == pytest.approx(one, rel=1e-6)
    require_equal(gradients, wanted)


@pytest.mark.parametrize("model", [None, GPT])
def test_recomputed_activations_give_the_same_bits(config: TrainConfig, model: Any) -> None:
    config = dataclasses.replace(config, model=model or config.model)
    (loss, gradients), (one, wanted) = whole(config, recompute=True), whole(config)
    assert loss == one and all(torch.equal(gradients[name], wanted[name]) for name in wanted)


def test_recomputing_stores_fewer_activations(config: TrainConfig) -> None:
    def stored(recompute: bool) -> int:
        sizes: list[int] = []
        model = build(config.model, 0)
        model.recompute = recompute
        batch = batch_at(load(config.data).train, 0, 0, config.batch, config.seq_len)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(batch[0])
        return sum(sizes)

    assert stored(True) < 0.5 * stored(False)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_micro_batches_on_two_ranks(tmp_path: Path, config: TrainConfig, kind: str) -> None:
    """Each rank has two rows, one at a time; DDP reduces once per bucket, in the last pass."""
    ranks.start(ranks.gradients, config, 1, kind == "fsdp2", kind, tmp_path / "one.pt", log=tmp_path / "log")
    found = torch.load(tmp_path / "one.pt")
    loss, wanted = whole(config)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    require_equal(found["gradients"], wanted)
    if kind == "ddp":
        ranks.start(ranks.gradients, config, 0, False, kind, tmp_path / "all.pt", log=tmp_path / "log")
        assert found["reductions"] == torch.load(tmp_path / "all.pt")["reductions"] > 0


def test_validation_in_pieces(config: TrainConfig) -> None:
    model = build(config.model, 0)
    batches = [batch_at(load(config.data).train, 1, step, 4, config.seq_len) for step in range(3)]
    whole_loss = passes.validation_loss(model, batches)
    assert passes.validation_loss(model, batches, rows=3) == pytest.approx(whole_loss, rel=1e-6)


def test_bf16_is_close_to_fp32_and_steps_fp32_parameters(tmp_path: Path, config: TrainConfig) -> None:
    """The products are in bf16: the loss differs in the fourth digit, and parameters and state stay fp32."""
    half = dataclasses.replace(config, precision="bf16")
    assert half.hash != config.hash
    losses = [train(c, tmp_path)["final_val_loss"] for c in (config, half)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=5e-3)
    model = build(config.model, 0)
    batch = batch_at(load(config.data).train, 0, 0, 4, config.seq_len)
    seen: list[torch.dtype] = []
    model.layers[0].attention.wq.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    passes.backward(model, batch, rows=2, casting=passes.cast(torch.device("cpu"), "bf16", "alone"))
    assert seen == [torch.bfloat16] * 2
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_compiled_run_is_the_same_run(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same hash, and the same losses up to rounding; the options are recorded.

    The layers are captured and differentiated as ever, but not turned into C++, which takes two minutes.
    """
    graphs: list[Any] = []
    whole = torch.compile

    def eager(function: Any) -> Any:
        graphs.append(whole(function, backend="aot_eager", fullgraph=True))
        return graphs[-1]

    monkeypatch.setattr(torch, "compile", eager)
    config = dataclasses.replace(config, steps=3, eval_every=3, checkpoint_every=0)
    plain = train(config, tmp_path / "plain")
    options = Options(compile=True, micro_batch=2, recompute=True)
    compiled = train(config, tmp_path / "compiled", options)
    assert compiled["final_val_loss"] == pytest.approx(plain["final_val_loss"], abs=1e-5)
    how = read_json(run_folder(tmp_path / "compiled", config.with_rules_hash()) / "environment.json")
    assert (how["compile"], how["micro_batch"], how["recompute"], how["parameters_on"]) == (True, 2, True, "cpu")
    assert len(graphs) == config.model.n_layers


def test_options_that_make_no_sense_are_named(tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="micro_batch=-1 must be at least 0"):
        Options(micro_batch=-1)
    from experiments.models import MLPConfig

    small = dataclasses.replace(config, model=MLPConfig(), data="python-stdlib-8", seq_len=8)
    with pytest.raises(Refused, match="recompute=True: a MLPClassifier has no layers"):
        train(small, tmp_path, Options(recompute=True))
