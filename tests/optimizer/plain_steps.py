"""What the tests of gradient release and of CPU offload compare with: the plain step under the same schedule."""

from __future__ import annotations

from typing import Any

import torch

OPTIONS: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    """Changes lr and beta1 of every group at every step: three up, seven down."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=10)


def same_state(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys() and ours["state"]
    for key, state in ours["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        assert all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())
