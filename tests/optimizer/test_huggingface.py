"""The Trainer's door: hyper-parameters are the TrainingArguments', roles the model's. Training: ``make interop``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimizer import AdamMini, partition
from optimizer.wrappers.huggingface import AdamMiniMixin, adam_mini

# Trainer takes seconds to import: in the tests, and in one worker.
pytestmark = pytest.mark.xdist_group("trainer")


@pytest.fixture(scope="module")
def trainer_class() -> type[Any]:
    from transformers import Trainer

    class AdamMiniTrainer(AdamMiniMixin, Trainer):
        pass

    return AdamMiniTrainer


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8, use_cache=False,
    ))  # fmt: skip


def arguments(folder: Path) -> Any:
    from transformers import TrainingArguments

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


def test_the_mixin_does_as_the_arguments_say(trainer_class: Any, tmp_path: Path) -> None:
    model = llama()
    optimizer = trainer_class(model, arguments(tmp_path)).create_optimizer()
    decaying, rest = optimizer.param_groups
    for group in (decaying, rest):
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.97), 1e-7)
    assert decaying["weight_decay"] == 0.2 and rest["weight_decay"] == 0.0
    assert all("norm" in name for name in rest["param_names"])
    assert not any("norm" in name for name in decaying["param_names"])
    assert blocks(optimizer) == {name: layout.n_blocks for name, layout in partition(model).items()}


def test_further_options_are_a_subclass_s(trainer_class: Any, tmp_path: Path) -> None:
    class ShortRun(trainer_class):
        adam_mini_options = {"rules": "short_run"}  # noqa: RUF012

    model = llama()
    optimizer = ShortRun(model, arguments(tmp_path)).create_optimizer()
    value = "model.layers.0.self_attn.v_proj.weight"
    assert blocks(optimizer)[value] == 1 < partition(model)[value].n_blocks


def test_an_optimizer_that_was_given_stays(trainer_class: Any, tmp_path: Path) -> None:
    model = llama()
    given = torch.optim.SGD(model.parameters())
    assert trainer_class(model, arguments(tmp_path), optimizers=(given, None)).create_optimizer() is given


def test_two_optimizers_asked_for_are_refused(trainer_class: Any, tmp_path: Path) -> None:
    trainer = trainer_class(llama(), arguments(tmp_path), optimizer_cls_and_kwargs=(AdamMini, {"lr": 1e-3}))
    with pytest.raises(ValueError, match="one of the two"):
        trainer.create_optimizer()


def test_the_factory_is_given_the_model(tmp_path: Path) -> None:
    from transformers import Trainer

    model, options = llama(), {"lr": 2e-3, "weight_decay": 0.3}
    trainer = Trainer(model, arguments(tmp_path), optimizer_cls_and_kwargs=(adam_mini, options))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, AdamMini)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert blocks(optimizer) == {name: layout.n_blocks for name, layout in partition(model).items()}


def test_a_model_that_fsdp1_wrapped_gets_its_state_at_once(trainer_class: Any, tmp_path: Path) -> None:
    """Trainer gives the model then; resuming would load nothing into an optimizer without state."""
    model = llama()
    optimizer = trainer_class(model, arguments(tmp_path)).create_optimizer(model)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert not trainer_class(llama(), arguments(tmp_path)).create_optimizer().state
