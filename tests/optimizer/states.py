"""Trained optimizers, and how the tests of checkpoints compare states and expect refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from optimizer import AdamMini
from tests.optimizer.models import Llama, train


def trained(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, AdamMini]:
    model = Llama() if model is None else model
    opt = AdamMini(model, **{"lr": 1e-2, "weight_decay": 0.1, **options})
    train(model, opt)
    return model, opt


def by_name(opt: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {
        name: opt.state[p]
        for group in opt.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def equal(a: Any, b: Any) -> bool:
    """Nested documents, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


def same_weights(a: nn.Module, b: nn.Module, atol: float = 0.0) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def refused(opt: AdamMini, document: Any, words: str, **options: Any) -> None:
    """The document is refused with these words, and nothing has changed."""
    before, given = copy.deepcopy(opt.state_dict()), copy.deepcopy(document)
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(document, **options)
    assert equal(opt.state_dict(), before), "something moved"
    assert equal(document, given), "the caller's document was changed"
