"""The control is Adam-mini with other blocks and nothing else: its limiting cases are AdamMini and AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.baselines import STATISTICS, PermutedAdamMini, StatisticAdamMini
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


@pytest.mark.parametrize("rules", ["adam_mini", "slim_adam"])
def test_the_mean_of_second_moments_is_adam_mini(rules: str) -> None:
    ours = trained(StatisticAdamMini, statistic="mean", rules=rules)
    assert largest_gap(ours, trained(AdamMini, rules=rules)) < TOLERANCE


@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_statistic_of_equal_values_is_that_value_and_of_single_elements_adamw(statistic: str) -> None:
    torch.testing.assert_close(STATISTICS[statistic](torch.full((2, 5), 0.25)), torch.full((2,), 0.25))
    assert largest_gap(trained(StatisticAdamMini, statistic=statistic, rules="elementwise"), trained(adamw)) < TOLERANCE


def test_statistics_of_unequal_values() -> None:
    v = torch.tensor([[1.0, 4.0, 16.0]])
    wanted = {"mean": 7.0, "max": 16.0, "min": 1.0, "median": 4.0, "geometric": 4.0, "jensen": (1.75 / 3) ** -2}
    assert {name: function(v).item() for name, function in STATISTICS.items()} == pytest.approx(wanted)


def test_blocks_of_different_sizes_each_have_their_own_statistic() -> None:
    optimizer = StatisticAdamMini(nn.Linear(2, 2), "max")
    ids, squares = torch.tensor([0, 1, 0, 2, 1, 0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert optimizer.second_moments({}, squares, ids, 1.0).tolist() == [6.0, 5.0, 4.0]


def test_an_unknown_statistic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"statistic='mode' is unknown; choose from"):
        StatisticAdamMini(nn.Linear(2, 2), "mode")
