"""Checks, and the small training runs they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.subjects import Subject

LR = 2.0**-7  # a power of two: as a float32 tensor it is the same number

SHAPES = {
    "blocks.0.mlp.up_proj.weight": (6, 4), "blocks.0.mlp.up_proj.bias": (6,), "blocks.0.mlp.down_proj.weight": (4, 6),
    "tok_embed.weight": (5, 4),
}  # fmt: skip
"""A small network by names that say what the tensors are, to the published package as well."""

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Check:
    """One clause of the contract.

    Attributes:
        name: the function's.
        run: raises when the subject breaks it.
        applies: to which subjects; a check that does not apply is not run.
    """

    name: str
    run: Callable[[Subject], None]
    applies: Callable[[Subject], bool]


CHECKS: dict[str, Check] = {}


def check(
    function: Callable[[Subject], None] | None = None, *, applies: Callable[[Subject], bool] = lambda subject: True
) -> Any:
    """Enter a function into the contract."""

    def enter(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        name = run.__name__
        assert name not in CHECKS, f"two checks are called {name}"
        assert run.__doc__, f"{name} does not say what breaks for a user"
        CHECKS[name] = Check(name, run, applies)
        return run

    return enter(function) if function is not None else enter


def ours(subject: Subject) -> bool:
    """Promises beyond torch's."""
    return subject.ours


def named(seed: int = 0, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Named:
    """(name, parameter) pairs; the same seed gives the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))
        for name, shape in shapes.items()
    ]


def one(shape: tuple[int, ...] = (4, 3), seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """One parameter."""
    return named(seed, dtype, {"blocks.0.mlp.up_proj.weight": shape})[0][1]


def pair(parameter: nn.Parameter, name: str = "blocks.0.mlp.up_proj.weight") -> Named:
    """One parameter with a name, as a list."""
    return [(name, parameter)]


def tensors(pairs: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters without their names."""
    return [parameter for _, parameter in pairs]


def values(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of what they hold now."""
    return [p.detach().clone() for p in params]


def give_gradients(params: Sequence[Tensor], seed: int) -> None:
    """Random gradients; the same seed gives the same numbers."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def give_signs(params: Iterable[Tensor], size: float = 1.0) -> list[Tensor]:
    """Gradients of +size and -size: every partition then moves each element by the learning rate, against the sign."""
    signs = []
    for p in params:
        sign = torch.ones(p.numel(), dtype=p.dtype)
        sign[::2] = -1
        signs.append(sign.reshape(p.shape))
        p.grad = size * signs[-1]
    return signs


def random_steps(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int = 3, start: int = 0) -> None:
    """Steps over random gradients that depend on the number of the step alone."""
    for step in range(start, start + steps):
        give_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()


def trained(subject: Subject, steps: int = 3, start: int = 0, seed: int = 0, **options: Any) -> tuple[Any, Named]:
    """An optimizer of the usual network after some steps."""
    pairs = named(seed)
    optimizer = subject.make(pairs, **{"lr": LR, **options})
    random_steps(optimizer, tensors(pairs), steps, start)
    return optimizer, pairs


def set_all(optimizer: torch.optim.Optimizer, **options: Any) -> None:
    """Set options in every group."""
    for group in optimizer.param_groups:
        group.update(options)


def assert_same(some: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """The same numbers, bit by bit."""
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)


def state_of(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of everything the optimizer remembers of the parameters, in order."""
    return [
        torch.as_tensor(value).detach().clone()
        for p in params
        for _, value in sorted(optimizer.state[p].items())
        if isinstance(value, (Tensor, int, float))
    ]


def assert_close(some: Iterable[Tensor], others: Iterable[Tensor], tolerance: float = 1e-6) -> None:
    """The same numbers to rounding of float32."""
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def assert_moved(some: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """Every tensor differs."""
    assert all(not torch.equal(a.detach(), b.detach()) for a, b in zip(some, others, strict=True) if a.numel())


def assert_refused(kinds: Any, act: Callable[[], Any], params: Iterable[Tensor] = ()) -> None:
    """``act`` raises one of ``kinds``, and the parameters are what they were."""
    params = list(params)
    before = values(params)
    with pytest.raises(kinds):
        act()
    assert_same(params, before)
