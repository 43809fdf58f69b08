"""What holds for gradient release and for CPU offload: they work under a compiler and keep no parameter alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from optimizer import AdamMini
from optimizer.memory import CPUOffload, gradient_release
from tests.optimizer.models import Llama, batch, loss_of, train
from tests.optimizer.plain_steps import OPTIONS
from tests.optimizer.states import same_weights


@pytest.mark.parametrize("build", [lambda m: gradient_release(AdamMini(m, **OPTIONS)).optimizer,
                                   lambda m: CPUOffload(m, **OPTIONS)], ids=["release", "offload"])  # fmt: skip
def test_under_a_compiled_model_and_step(build: Any) -> None:
    plain, model = Llama(), Llama()
    train(plain, AdamMini(plain, **OPTIONS), range(3))
    optimizer = build(model)
    compiled, step = torch.compile(model, backend="eager"), torch.compile(optimizer.step, backend="eager")
    for t in range(3):
        loss_of(compiled, batch(11, t)).backward()
        step()
        optimizer.zero_grad()
    same_weights(model, plain)


@pytest.mark.parametrize("build", [lambda m: gradient_release(AdamMini(m)).optimizer, CPUOffload])
def test_parameters_are_freed_with_their_optimizer(build: Any) -> None:
    model = Llama()
    optimizer = build(model)
    train(model, optimizer, range(1))
    alive = [weakref.ref(optimizer), *(weakref.ref(p) for p in model.parameters())]
    del model, optimizer
    gc.collect()
    assert not any(ref() is not None for ref in alive)
