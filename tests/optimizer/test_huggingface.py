"""The Trainer's door: hyper-parameters are the TrainingArguments', roles the model's. Training: ``make interop``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from optimizer import AdamMini, partition
from optimizer.wrappers.huggingface import AdamMiniMixin, adam_mini


class AdamMiniTrainer(AdamMiniMixin, Trainer):
    pass


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8, use_cache=False,
    ))  # fmt: skip


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        str(folder), learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.97, adam_epsilon=1e-7, weight_decay=0.2,
        use_cpu=True, report_to="none",
    )  # fmt: skip


def blocks(optimizer: AdamMini) -> dict[str, int]:
    return {
        name: layout.n_blocks
        for group, layouts in zip(optimizer.param_groups, optimizer.layouts, strict=True)
        for name, layout in zip(group["param_names"], layouts, strict=True)
    }


def test_the_mixin_does_as_the_arguments_say(tmp_path: Path) -> None:
    model = llama()
    optimizer = AdamMiniTrainer(model, arguments(tmp_path)).create_optimizer()
    decaying, rest = optimizer.param_groups
    for group in (decaying, rest):
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.97), 1e-7)
    assert decaying["weight_decay"] == 0.2 and rest["weight_decay"] == 0.0
    assert all("norm" in name for name in rest["param_names"])
    assert not any("norm" in name for name in decaying["param_names"])
    assert blocks(optimizer) == {name: layout.n_blocks for name, layout in partition(model).items()}


def test_further_options_are_a_subclass_s(tmp_path: Path) -> None:
    class ShortRun(AdamMiniTrainer):
        adam_mini_options = {"rules": "short_run"}  # noqa: RUF012

    model = llama()
    optimizer = ShortRun(model, arguments(tmp_path)).create_optimizer()
    value = "model.layers.0.self_attn.v_proj.weight"
    assert blocks(optimizer)[value] == 1 < partition(model)[value].n_blocks


def test_an_optimizer_that_was_given_stays(tmp_path: Path) -> None:
    model = llama()
    given = torch.optim.SGD(model.parameters())
    assert AdamMiniTrainer(model, arguments(tmp_path), optimizers=(given, None)).create_optimizer() is given


def test_two_optimizers_asked_for_are_refused(tmp_path: Path) -> None:
    trainer = AdamMiniTrainer(llama(), arguments(tmp_path), optimizer_cls_and_kwargs=(AdamMini, {"lr": 1e-3}))
    with pytest.raises(ValueError, match="one of the two"):
        trainer.create_optimizer()


def test_the_factory_is_given_the_model(tmp_path: Path) -> None:
    model, options = llama(), {"lr": 2e-3, "weight_decay": 0.3}
    trainer = Trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(adam_mini, options))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, AdamMini)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert blocks(optimizer) == {name: layout.n_blocks for name, layout in partition(model).items()}


def test_a_model_that_fsdp1_wrapped_gets_its_state_at_once(tmp_path: Path) -> None:
    """Trainer gives the model then; resuming would load nothing into an optimizer without state."""
    model = llama()
    optimizer = AdamMiniTrainer(model, arguments(tmp_path)).create_optimizer(model)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert not AdamMiniTrainer(llama(), arguments(tmp_path)).create_optimizer().state
