"""What ranks do in the tests of whole state: train under one wrapper, go on under another."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from optimizer import AdamMini
from optimizer.sharding import full_state_dict, load_full_state_dict
from tests.sharding.models import MODELS, batches, loss_of
from tests.sharding.training import OPTIONS, WRAPS, Run, elements, local, plain

SHARES = 12
"""Batches of a step, whoever computes them."""


def _start(name: str, wrap: str, weights: dict[str, Tensor] | None = None, **more: Any) -> Run:
    model = MODELS[name]().to(torch.float64)
    if weights is not None:
        model.load_state_dict(weights)
    wrapped = WRAPS[wrap](model) if wrap != "plain" else model
    return Run(wrapped, AdamMini(wrapped, **OPTIONS, **more), wrap, dist.get_world_size(), dist.get_rank(), [])


def _train(run: Run, first: int, last: int) -> None:
    replicas, replica = (1, 0) if run.wrap == "plain" else (run.replicas, run.replica)
    for step in range(first, last):
        run.optimizer.zero_grad()
        loss_of(run.model, torch.cat(batches(step, SHARES)[replica::replicas])).backward()
        run._clip()
        run.optimizer.step()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    return {plain(name): value.clone() for name, value in get_model_state_dict(model, options=options).items()}


def across_case(name: str, wraps: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """Three steps under each wrapper, three more under each: the largest differences to six in one process."""
    alone = _start(name, "plain", **more)
    _train(alone, 0, 3)
    state_of_one = copy.deepcopy(alone.optimizer.state_dict())
    _train(alone, 3, 6)
    wanted = {n: p.detach() for n, p in alone.model.named_parameters()}
    out: dict[str, Any] = {}
    for source in wraps:
        run = _start(name, source, **more)
        _train(run, 0, 3)
        document = full_state_dict(run.optimizer, rank0_only=False)
        assert document is not None
        out[f"{source} whole"] = _apart(document, state_of_one)
        weights = _on_all(_weights(run.model) if source != "plain" else run.model.state_dict())
        for target in wraps:
            then = _start(name, target, weights, **more)
            load_full_state_dict(then.optimizer, document)
            _train(then, 3, 6)
            out[f"{source} to {target}"] = _difference(then, name, wanted)
    return out


def _on_all(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """FSDP1 gathers onto the first rank alone."""
    held = [weights]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _apart(document: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest difference of any state."""
    names = [n for group in document["param_groups"] for n in group["param_names"]]
    keys = [k for group in document["param_groups"] for k in group["params"]]
    own = {n: document["state"][k] for n, k in zip(names, keys, strict=True)}
    there = [n for group in wanted["param_groups"] for n in group["param_names"]]
    assert sorted(names) == sorted(there)
    worst = 0.0
    for k, n in enumerate(there):
        for key, value in wanted["state"][k].items():
            assert own[n][key].shape == value.shape, (n, key, own[n][key].shape, value.shape)
            worst = max(worst, float((own[n][key].double() - value.double()).abs().max()))
    return worst


def _difference(run: Run, name: str, wanted: dict[str, Tensor]) -> float:
    whole = torch.cat([p.flatten() for p in wanted.values()])
    if run.wrap == "plain":
        return float((torch.cat([p.detach().flatten() for p in run.model.parameters()]) - whole).abs().max())
    at, worst = elements(name, run.wrap), 0.0
    for n, p in run.model.named_parameters():
        number = at[plain(n)]
        apart = (local(p)[number > 0] - whole[number[number > 0].long() - 1]).abs()
        worst = max(worst, float(apart.max()) if apart.numel() else 0.0)
    return worst
