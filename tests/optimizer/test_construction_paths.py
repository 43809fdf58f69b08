"""One model, every way in: the optimizer's layouts are those of ``partition``, whatever wraps the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

from adam_mini import Adam_mini
from optimizer import AdamMini, Layout, partition, tag
from optimizer.partition import discover
from optimizer.partition.names import clean
from tests.optimizer.models import GPT, Llama, wrap_compiled
from tests.optimizer.zoo import TEXT

MODELS: dict[str, Callable[[], nn.Module]] = {
    name: TEXT[name] for name in ("gpt2", "llama grouped", "mixtral", "t5", "gpt_neox", "dbrx")
} | {"meta llama": Llama, "nano gpt": GPT}


def used(optimizer: AdamMini, model: nn.Module) -> dict[str, Layout]:
    """The layouts an optimizer uses, by the model's names."""
    optimizer.state_bytes()  # the published constructor resolves its blocks late
    by_id = {id(p): clean(name) for name, p in model.named_parameters()}
    return {
        by_id[id(p)]: layout
        for group, layouts in zip(optimizer.param_groups, optimizer.layouts, strict=True)
        for p, layout in zip(group["params"], layouts, strict=True)
    }


def groups(model: nn.Module, *, names: bool) -> list[dict[str, Any]]:
    """The usual two groups of a training script."""
    named = list(model.named_parameters())
    chosen = ([x for x in named if x[1].ndim >= 2], [x for x in named if x[1].ndim < 2])
    return [{"params": part if names else [p for _, p in part], "weight_decay": d}
            for part, d in zip(chosen, (0.1, 0.0), strict=True)]  # fmt: skip


DOORS: dict[str, Callable[[nn.Module], AdamMini]] = {
    "model": AdamMini,
    "named_parameters": lambda m: AdamMini(m.named_parameters()),
    "parameters": lambda m: AdamMini(m.parameters()),
    "tagged parameters": lambda m: AdamMini(list(tag(m).parameters())),
    "tagged groups": lambda m: AdamMini(groups(tag(m), names=False)),
    "tagged groups with names": lambda m: AdamMini(groups(tag(m), names=True)),
    "published, a model": lambda m: Adam_mini(m),
    "published": lambda m: Adam_mini(named_parameters=m.named_parameters(), dim=64, n_heads=4, n_kv_heads=4),
    "published, as LLaMA-Factory builds it": lambda m: Adam_mini(
        named_parameters=m.named_parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
        model_sharding=False, dim=None, n_heads=None, n_kv_heads=None,
    ),
    "published, tagged": lambda m: Adam_mini(list(tag(m).named_parameters()), dim=None, n_heads=None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_leads_to_the_same_partition(name: str, door: str) -> None:
    model = MODELS[name]()
    expected = {clean(n): layout for n, layout in partition(model).items()}
    assert used(DOORS[door](model), model) == expected


def _checkpointed(model: nn.Module) -> nn.Module:
    """Activation checkpointing around every block, as trainers put it."""
    for module in list(model.modules()):
        for child, block in list(module.named_children()):
            if type(block).__name__.endswith(("Block", "DecoderLayer", "T5LayerFF", "NeoXLayer")):
                setattr(module, child, checkpoint_wrapper(block))
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": wrap_compiled,
    "checkpointing": _checkpointed,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP2": lambda m: fully_shard(m),
    "FSDP1, original parameters": lambda m: FullyShardedDataParallel(
        m, use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD, device_id=torch.device("cpu")
    ),
    "compiled DDP of checkpointing": lambda m: wrap_compiled(nn.parallel.DistributedDataParallel(_checkpointed(m))),
}


@pytest.mark.parametrize("name", ["gpt2", "llama grouped", "mixtral", "gpt_neox", "nano gpt"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("door", ["model", "named_parameters", "tagged groups", "published"])
def test_wrapped_models(name: str, wrapper: str, door: str, one_rank: None) -> None:
    model = MODELS[name]()
    expected = {clean(n): layout for n, layout in partition(model).items()}
    wrapped = WRAPPERS[wrapper](model)
    found = partition(wrapped)
    assert {clean(n): layout for n, layout in found.items()} == expected
    assert used(DOORS[door](wrapped), wrapped) == expected


def test_without_a_name_or_a_tag(caplog: pytest.LogCaptureFixture) -> None:
    """Matrices get the unit of OTHER, said once, by shape, with the way to do better; vectors share nothing."""
    model = MODELS["llama grouped"]()
    with caplog.at_level(logging.WARNING, logger="optimizer"):
        optimizer = AdamMini(list(model.parameters()))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "tag(model)" in messages[0] and "(80, 48)" in messages[0]
    for p, layout in zip(model.parameters(), optimizer.layouts[0], strict=True):
        assert layout.n_blocks == (1 if p.ndim > 1 else len(p))


def test_a_parameter_in_two_groups() -> None:
    weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamMini([{"params": [("a.weight", weight)]}, {"params": [("b.weight", weight)]}])


def test_an_empty_model() -> None:
    assert partition(nn.Module()) == {}
    with pytest.raises(ValueError, match="no trainable parameters"):
        AdamMini(nn.Module())


def test_a_shared_weight_is_one_thing_and_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["llama grouped"]()
    with caplog.at_level(logging.INFO, logger="optimizer"):
        anatomy = discover(model)["model.embed_tokens.weight"]
    assert anatomy.role.value == "TOKEN_EMBEDDING"
    assert any("lm_head.weight" in r.getMessage() and "TOKEN_EMBEDDING" in r.getMessage() for r in caplog.records)


def test_tags_outlive_the_class_they_came_from() -> None:
    """Notebooks define a model's class again and again; a tag speaks of the tensor, not of the class."""
    model = tag(MODELS["nano gpt"]())
    expected = {clean(n): layout for n, layout in partition(model).items()}
    for module in model.modules():
        module.__class__ = (
            type(type(module).__name__, (nn.Module,), {})
            if "Attention" in type(module).__name__
            else (module.__class__)
        )
    assert used(AdamMini(list(model.parameters())), model) == expected


def test_a_tag_that_no_longer_fits_is_not_believed() -> None:
    parameter = next(iter(tag(MODELS["nano gpt"]()).parameters()))
    parameter.data = torch.zeros(5, 7)
    assert AdamMini([parameter]).layouts[0][0].fits((5, 7))
