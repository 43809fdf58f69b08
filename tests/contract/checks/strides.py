"""Strides: gradients and parameters that do not lie in memory row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.contract.harness import LR, assert_close, check, give_gradients, one, pair
from tests.contract.subjects import Subject


def _strided(subject: Subject, shape: tuple[int, ...], stride: Callable[[Tensor], Tensor]) -> None:
    """Gradients of other strides give the step that their contiguous copies give."""
    p, q = one(shape), one(shape)
    optimizer, reference = subject.make(pair(p), lr=LR, eps=1e-3), subject.make(pair(q), lr=LR, eps=1e-3)
    for step in range(3):
        give_gradients([q], step)
        q.grad = stride(q.grad).contiguous()
        p.grad = stride(q.grad)
        assert torch.equal(p.grad, q.grad)
        optimizer.step()
        reference.step()
    assert_close([p], [q])


@check
def transposed_gradients_are_right(subject: Subject) -> None:
    """Gradients of tied, transposed weights come with the strides of the transpose."""
    _strided(subject, (4, 6), lambda g: g.t().contiguous().t())


@check
def expanded_gradients_are_right(subject: Subject) -> None:
    """The gradient of a sum is one number with stride 0."""
    _strided(subject, (4, 6), lambda g: g[:, :1].contiguous().expand(4, 6))


@check
def sliced_gradients_are_right(subject: Subject) -> None:
    """A gradient that is every second column of a larger buffer."""
    _strided(subject, (4, 6), lambda g: torch.stack((g, -9 * g), dim=-1)[..., 0])


@check
def channels_last_gradients_are_right(subject: Subject) -> None:
    """cuDNN gives convolutions gradients in channels_last."""
    _strided(subject, (4, 3, 2, 2), lambda g: g.to(memory_format=torch.channels_last))


def _parameter_strided(subject: Subject, p: nn.Parameter) -> None:
    q = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    assert not p.is_contiguous() and q.is_contiguous()
    optimizer, reference = subject.make(pair(p), lr=LR, eps=1e-3), subject.make(pair(q), lr=LR, eps=1e-3)
    for step in range(3):
        give_gradients([q], step)
        p.grad = torch.empty_like(p).copy_(q.grad)
        optimizer.step()
        reference.step()
    assert_close([p], [q])


@check
def channels_last_parameters_are_right(subject: Subject) -> None:
    """model.to(memory_format=torch.channels_last), parameters and gradients alike."""
    _parameter_strided(subject, nn.Parameter(one((4, 3, 2, 2)).detach().to(memory_format=torch.channels_last)))


@check
def transposed_parameters_are_right(subject: Subject) -> None:
    """A weight that is stored transposed, parameters and gradients alike."""
    _parameter_strided(subject, nn.Parameter(one((6, 4)).detach().t()))


@check
def transposed_parameters_with_plain_gradients_are_right(subject: Subject) -> None:
    """Parameter and gradient of different strides are matched by index, not by address."""
    p, q = nn.Parameter(one((6, 4)).detach().t()), nn.Parameter(one((6, 4)).detach().t().contiguous())
    optimizer, reference = subject.make(pair(p), lr=LR, eps=1e-3), subject.make(pair(q), lr=LR, eps=1e-3)
    for step in range(3):
        for r in (p, q):
            give_gradients([r], step)
        optimizer.step()
        reference.step()
    assert_close([p], [q])
