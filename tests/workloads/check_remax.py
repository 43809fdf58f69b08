"""ReMax on small policies with a stand-in for the reward model: drawing, steps, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments import passes
from experiments.configs import TrainConfig
from experiments.grids import grid
from experiments.parallel import weights_sha256
from experiments.tasks import Task
from experiments.train import Refused, make_task, run_folder, train
from experiments.workloads import WORKLOADS, remax
from experiments.workloads.bases import Base, load_base
from experiments.workloads.remax import ReMax, Rewarded, nothing_to_learn
from experiments.workloads.rollouts import GREEDY, answer_logits, generate, padded
from optimizer import AdamMini, explain

CPU = torch.device("cpu")


def letters(said: Sequence[str]) -> Tensor:
    """Stand-in for the reward model: the share of the letter e."""
    return torch.tensor([text.count("e") / (1 + len(text)) for text in said])


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(remax, "trained_score", lambda: (letters, "0" * 16))


@pytest.fixture
def config() -> TrainConfig:
    """A smoke run of ReMax."""
    return next(c for c in grid("smoke", ("adam_mini",), "remax"))


def task_of(config: TrainConfig) -> Rewarded:
    made: Task = make_task(config, CPU)
    assert isinstance(made, Rewarded)
    return made


def check_a_smoke_run_of_each_arm_finishes(tmp_path: Path) -> None:
    for config in grid("smoke", None, "remax"):
        assert train(config, tmp_path)["state"] == "finished"
        folder = run_folder(tmp_path, config.with_rules_hash())
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert {"val_loss", "reward", "gain", "kl", "length"} <= records[-1].keys()
        kl, reward = records[-1]["kl"], records[-1]["reward"]
        assert records[-1]["val_loss"] == pytest.approx(config.model.beta * kl - reward)
        answers = json.loads((folder / "samples.json").read_text())["answers"]
        assert len(answers) == 4 and {"question", "before", "after", "after_reward"} <= answers[0].keys()


def check_a_run_that_is_killed_resumes_to_the_same_weights(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config, tmp_path / "whole")
    step = Rewarded.loss

    def killed(self: Rewarded, *arguments: Any) -> Tensor:
        if killed.calls == 3:
            raise KeyboardInterrupt
        killed.calls += 1
        return step(self, *arguments)

    killed.calls = 0  # type: ignore[attr-defined]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rewarded, "loss", killed)
        train(config, tmp_path / "cut")
    again = train(config, tmp_path / "cut")
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert again["final_val_loss"] == whole["final_val_loss"]


def check_a_step_is_the_same_however_its_rows_are_cut(config: TrainConfig) -> None:
    found = []
    for rows in (0, 1):
        task = task_of(config)
        passes.backward(task.model, task.batch(0), rows=rows, loss_of=task.loss)
        found.append({name: p.grad for name, p in task.model.named_parameters()})
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-6)
    assert max(float(g.abs().max()) for g in found[0].values() if g is not None) > 1e-4


def check_drawing_in_autocast_leaves_the_gradient_whole(config: TrainConfig) -> None:
    """Casts of weights that are made while answers are drawn have no graph, so the next pass must not use them."""
    task = task_of(config)
    casting = passes.cast(CPU, "bf16", "alone")
    passes.backward(task.model, task.batch(0), casting=casting, loss_of=task.loss)
    missing = [name for name, p in task.model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not missing


def small(base: Base, width: int, seed: int, loud: float = 1.0) -> nn.Module:
    """A policy with random weights; ``loud`` weights make its answers depend on all tokens before."""
    model = load_base(base, width, seed=seed).model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(loud)
    return model


def check_greedy_answers_are_those_of_transformers_and_padding_changes_nothing() -> None:
    model = small("smollm2", 96, seed=1, loud=8.0)
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    tokens, mask = padded(rows, 0)
    answers = generate(model, tokens, mask, torch.full((2, 6), GREEDY), (299,))
    for row, got in zip(rows, answers.tokens, strict=True):
        wanted = model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), max_new_tokens=6,
            do_sample=False, eos_token_id=299, pad_token_id=0,
        )  # fmt: skip
        assert got.tolist() == wanted[0, len(row) :].tolist()
    alone = generate(model, *padded(rows[1:], 0), torch.full((1, 6), GREEDY), (299,))
    logits = answer_logits(model, answers)
    torch.testing.assert_close(logits[1:], answer_logits(model, alone), rtol=1e-3, atol=1e-3)
    assert bool((logits.argmax(-1) == answers.tokens)[answers.mask.bool()].all())


def check_an_answer_ends_at_its_end() -> None:
    model = small("smollm2", 64, seed=0)
    prompts, mask = padded([[1, 2]], 0)
    first = generate(model, prompts, mask, torch.full((1, 5), GREEDY), (49,)).tokens[0, 0]
    assert generate(model, prompts, mask, torch.full((1, 5), GREEDY), (int(first),)).mask.tolist() == [[1, 0, 0, 0, 0]]


def check_the_reference_has_no_divergence_and_stays(config: TrainConfig) -> None:
    task = task_of(config)
    before = weights_sha256(task.reference)
    assert task.evaluate(casting=passes.cast(CPU, "bf16", "alone"))["kl"] == 0
    loss = passes.backward(task.model, task.batch(0), loss_of=task.loss)
    torch.optim.SGD(task.model.parameters(), 1.0).step()
    found = task.evaluate(casting=passes.cast(CPU, "fp32", "alone"))
    assert bool(torch.isfinite(loss)) and found["kl"] > 0 and found["gain"] != 0
    assert weights_sha256(task.reference) == before


def check_what_has_gone_wrong_is_named(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remax, "trained_score", lambda: (lambda said: torch.full((len(said),), torch.nan), "1" * 16))
    with pytest.raises(RuntimeError, match="rewards are not finite"):
        train(config, tmp_path / "nan")
    monkeypatch.setattr(remax, "trained_score", lambda: (lambda said: torch.full((len(said),), 0.5), "1" * 16))
    ending = train(config, tmp_path / "equal")  # how a policy that gives one answer to everything ends
    assert ending["state"] == "diverged" and "rewards are 0.5, so nothing can be learnt" in ending["reason"]
    assert nothing_to_learn(torch.zeros(remax.FEW - 1)) == ""


def check_a_run_that_diverges_from_its_reference_stops_and_keeps_its_checkpoint(
    config: TrainConfig, tmp_path: Path
) -> None:
    hot = dataclasses.replace(
        config, model=dataclasses.replace(config.model, kl_limit=1e-3), lr=0.03, checkpoint_every=1, steps=9
    )
    ending = train(hot, tmp_path)
    assert ending["state"] == "diverged" and "over kl_limit=0.001" in ending["reason"]
    assert list((run_folder(tmp_path, hot.with_rules_hash()) / "checkpoints").glob("step-*"))
    assert train(hot, tmp_path) == ending  # not run again


def check_bad_input_is_refused_by_name(config: TrainConfig, tmp_path: Path) -> None:
    for change, words in (
        ({"data": "fashion-mnist"}, "is no set of requests"),
        ({"seq_len": 40}, "seq_len=40 must be at least 4"),
        ({"seq_len": 10**6}, "the model's context"),
        ({"batch": 1000}, "batch=1000 must be at most"),
    ):
        with pytest.raises((Refused, ValueError), match=words):
            train(dataclasses.replace(config, **change), tmp_path)
    with pytest.raises(FileNotFoundError, match="accept Meta's licence"):
        dataclasses.replace(config, model=ReMax("llama-2-7b")).model.fetch(config)
    policy = load_base("smollm2", 64, seed=0)
    policy.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Rewarded(config, config.model, policy, letters, "0" * 8, CPU)


@pytest.mark.parametrize("name", WORKLOADS["remax"].full)
def check_the_full_configuration_takes_two_steps_at_reduced_width(name: str, tmp_path: Path) -> None:
    workload = WORKLOADS["remax"]
    full = TrainConfig("full", **{**workload.run, **workload.full[name]})
    assert isinstance(full.model, ReMax) and full.model.width == 0
    reduced = dataclasses.replace(
        full, model=dataclasses.replace(full.model, width=128, new_tokens=8), steps=2, batch=4, eval_batches=1,
        eval_every=1, checkpoint_every=0,
    )  # fmt: skip
    assert train(reduced, tmp_path)["state"] == "finished"


def check_every_weight_of_the_policies_is_recognised() -> None:
    for policy in (small("smollm2", 96, 0), small("llama-2-7b", 128, 0)):
        text = str(explain(policy))
        assert "OTHER" not in text, text
        AdamMini(policy, strict=True)
