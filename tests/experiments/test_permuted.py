"""The control is Adam-mini with other blocks and nothing else: its limiting cases are AdamMini and AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.baselines import PermutedAdamMini
from experiments.models import LlamaConfig, build, lm_loss
from optimizer import AdamMini, partition

CONFIG = LlamaConfig(vocab=11, dim=16, n_layers=1, n_heads=4, n_kv_heads=2, hidden=24)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def trained(make: type, steps: int = 10, **options: object) -> dict[str, torch.Tensor]:
    model = build(CONFIG, 0).double()
    optimizer = make(model, **OPTIONS, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(11, (2, 9), generator=generator)
        optimizer.zero_grad()
        lm_loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def adamw(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    groups = AdamMini(model, **OPTIONS).param_groups
    return torch.optim.AdamW([{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], **options)


def largest_gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


# float64; lr 1e-2 over ten steps: rounding, not a wrong term, must explain the gap.
TOLERANCE = 1e-12


def test_one_block_per_element_is_adamw_even_when_shuffled() -> None:
    ours = trained(PermutedAdamMini, rules="elementwise", seed=5)
    assert largest_gap(ours, trained(adamw)) < TOLERANCE


@pytest.mark.parametrize("rules", ["adam_mini", "slim_adam", "pytorch_default"])
def test_identity_permutation_is_adam_mini(rules: str) -> None:
    ours = trained(PermutedAdamMini, rules=rules, seed=None)
    assert largest_gap(ours, trained(AdamMini, rules=rules)) < TOLERANCE


def test_shuffle_has_an_effect_and_comes_from_the_seed() -> None:
    zero, again, one = (trained(PermutedAdamMini, seed=s) for s in (0, 0, 1))
    assert largest_gap(zero, again) == 0
    assert largest_gap(zero, one) > 1e-4
    assert largest_gap(zero, trained(AdamMini)) > 1e-4


def test_block_sizes_are_adam_minis() -> None:
    model = build(CONFIG, 0)
    optimizer = PermutedAdamMini(model, seed=3)
    layouts = partition(model)
    for group, group_ids in zip(optimizer.param_groups, optimizer._ids, strict=True):
        for name, parameter, ids in zip(group["param_names"], group["params"], group_ids, strict=True):
            wanted = layouts[name].block_ids(parameter.shape).flatten()
            assert torch.equal(ids.bincount(), wanted.bincount())
    assert optimizer.n_scalars == sum(layout.n_blocks for layout in layouts.values())
