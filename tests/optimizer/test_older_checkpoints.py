"""Checkpoints that version 0.1 wrote before its modules moved: every form loads, and training goes on from it.

Each was written by ``after_three_steps``. Loading must give the state that these steps give today.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from adam_mini import Adam_mini
from optimizer import AdamMini
from optimizer.sharding import load_full_state_dict
from optimizer.tools.convert.file import converted
from tests.optimizer.models import Llama

FOLDER = Path(__file__).parent / "checkpoints" / "lab_0.1"
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {}, "bf16_moment": {"exp_avg_dtype": torch.bfloat16}, "int8": {"exp_avg_dtype": "int8"},
    "int4": {"exp_avg_dtype": "int4"}, "kahan": {"bf16_rounding": "kahan"}, "slim_adam": {"rules": "slim_adam"},
}  # fmt: skip


def model(form: str = "fp32") -> nn.Module:
    wide = form.startswith("int")  # large enough for a quantised moment
    made = Llama(vocab=8, dim=64, layers=1, hidden=64) if wide else Llama(layers=1)
    return made.to(torch.bfloat16) if form == "kahan" else made


def optimizer_of(net: nn.Module, **options: Any) -> AdamMini:
    return AdamMini(net, lr=1e-2, weight_decay=0.1, **options)


def door_of(net: nn.Module) -> Adam_mini:
    return Adam_mini(net.named_parameters(), lr=1e-2, weight_decay=0.1, dim=16, n_heads=4, n_kv_heads=2)


def give_gradients(parameters: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)


def after_three_steps(net: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for step in range(3):
        give_gradients(net.parameters(), step)
        optimizer.step()
    return optimizer


def assert_same_state(loaded: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours["state"].keys() == theirs["state"].keys() and ours["state"]
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys()
        for name, tensor in state.items():
            found = ours["state"][key][name]
            if found.dtype in (torch.int8, torch.uint8):  # processors may round a code differently, rarely
                assert (found != tensor).float().mean() < 0.01, (key, name)
            else:
                torch.testing.assert_close(
                    found, tensor, rtol=2e-2 if found.dtype == torch.bfloat16 else 1e-5, atol=1e-7
                )
    for a, b in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {k: a[k] for k in ("lr", "weight_decay", "betas", "rules")} == {
            k: b[k] for k in ("lr", "weight_decay", "betas", "rules")
        }


def state_dicts() -> dict[str, Any]:
    return torch.load(FOLDER / "state_dicts.pt", weights_only=True)


@pytest.mark.parametrize("form", OPTIONS)
def test_state_dicts(form: str) -> None:
    document, expected, fresh = state_dicts()[form], model(form), model(form)
    loaded = optimizer_of(fresh, **OPTIONS[form])
    loaded.load_state_dict(document)
    assert_same_state(loaded, after_three_steps(expected, optimizer_of(expected, **OPTIONS[form])))
    give_gradients(fresh.parameters(), 3)
    loaded.step()


@pytest.mark.parametrize(("file", "make"), [("pickled_adam_mini.pt", optimizer_of), ("pickled_door.pt", door_of)])
def test_pickled_optimizers(file: str, make: Any) -> None:
    loaded = torch.load(FOLDER / file, weights_only=False)
    net = model()
    expected = after_three_steps(net, make(net))
    assert_same_state(loaded, expected)
    own = [p for group in loaded.param_groups for p in group["params"]]
    theirs = [p for group in expected.param_groups for p in group["params"]]
    for parameters, one in ((own, loaded), (theirs, expected)):
        give_gradients(parameters, 3)
        one.step()
    for p, q in zip(own, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_state_of_whole_parameters() -> None:
    net, fresh = model(), model()
    loaded = optimizer_of(fresh)
    load_full_state_dict(loaded, torch.load(FOLDER / "full_state.pt", weights_only=True))
    assert_same_state(loaded, after_three_steps(net, optimizer_of(net)))


def test_distributed_checkpoints() -> None:
    net, fresh = model(), model()
    loaded = optimizer_of(fresh)
    document = get_optimizer_state_dict(fresh, loaded)
    dcp.load({"optimizer": document}, checkpoint_id=str(FOLDER / "distributed"))
    set_optimizer_state_dict(fresh, loaded, document)
    assert_same_state(loaded, after_three_steps(net, optimizer_of(net)))


def test_files_are_converted() -> None:
    document, report = converted(state_dicts()["fp32"], model(), "slim_adam")
    assert report.kind == "ours" and report.rebuilt > 0
    optimizer_of(model(), rules="slim_adam").load_state_dict(document)
