"""Adam-mini as the paper writes it: one block at a time, every symbol under the paper's name; and its factored form.

These references are simple and slow. The tests compare every other implementation of the step with them.

Source: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv 2406.16793, Algorithm 1. As in the
authors' code, weight decay is decoupled and epsilon is added outside the square root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BlockState:
    """The optimizer state of one tensor.

    Attributes:
        t: number of steps taken.
        m: first moment, flattened, [n].
        v: second moment, one value per block, [B].
    """

    t: int
    m: Tensor
    v: Tensor


def initial_state(p: Tensor, block_ids: Tensor) -> BlockState:
    """Return the state before the first step.

    Args:
        p: the parameter, any shape.
        block_ids: int64, shape of ``p``: the block of every element, numbered 0, 1, ...

    Returns:
        A state of zeros; ``v`` is fp32, or float64 for a float64 parameter.
    """
    n_blocks = int(block_ids.max()) + 1 if block_ids.numel() else 0
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return BlockState(0, torch.zeros_like(p).reshape(-1), torch.zeros(n_blocks, dtype=dtype))


def reference_step(
    p: Tensor,
    g: Tensor,
    state: BlockState,
    block_ids: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> Tensor:
    """Compute one Adam-mini step of one tensor.

    Args:
        p: the parameter, any shape; not changed.
        g: its gradient, same shape; not changed.
        state: the tensor's state; updated in place.
        block_ids: int64, shape of ``p``: the block of every element.
        lr: learning rate.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: coefficient of the decoupled weight decay.
        maximize: whether to ascend the gradient instead of descending it.

    Returns:
        The new parameter.
    """
    state.t += 1
    theta = p.detach().clone().reshape(-1)
    gradient = (-g if maximize else g).detach().reshape(-1)
    ids = block_ids.reshape(-1)

    theta = theta - lr * weight_decay * theta
    state.m = beta1 * state.m + (1 - beta1) * gradient
    m_hat = state.m / (1 - beta1**state.t)
    for b in range(len(state.v)):
        inside = ids == b
        g_b = gradient[inside].to(state.v.dtype)
        state.v[b] = beta2 * state.v[b] + (1 - beta2) * (g_b * g_b).mean()
        v_hat_b = state.v[b] / (1 - beta2**state.t)
        theta[inside] = theta[inside] - lr * m_hat[inside] / (v_hat_b.sqrt() + eps).to(theta.dtype)
    return theta.reshape(p.shape)


@dataclass
class FactoredState:
    """The optimizer state of one part of a factored tensor, as a matrix of rows and columns.

    Attributes:
        t: number of steps taken.
        m: first moment, [rows, columns].
        r: moving average of the mean squared gradient of each row, [rows].
        c: moving average of the mean squared gradient of each column, [columns].
    """

    t: int
    m: Tensor
    r: Tensor
    c: Tensor


def initial_factored_state(p: Tensor) -> FactoredState:
    """Return the state before the first step: zeros; ``r`` and ``c`` are fp32, or float64 for a float64 parameter.

    Args:
        p: the parameter, [rows, columns].
    """
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    rows, columns = p.shape
    return FactoredState(0, torch.zeros_like(p), torch.zeros(rows, dtype=dtype), torch.zeros(columns, dtype=dtype))


def factored_reference_step(
    p: Tensor,
    g: Tensor,
    state: FactoredState,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> Tensor:
    """Compute one step of one part of a factored tensor.

    Source: Shazeer and Stern, arXiv 1804.04235, Algorithm 2, lines 4 to 8, with means instead of sums: R is ``r`` and
    C is ``c``. It has Adam's momentum as in Zhai et al., arXiv 2106.04560, Adam's constant betas with their bias
    corrections and AdamW's weight decay. It has no clipping of the update and no relative step size. Epsilon is
    added outside the square root, as in AdamW.

    Args:
        p: the parameter as a matrix, [rows, columns]; not changed.
        g: its gradient, same shape; not changed.
        state: the part's state; updated in place.
        lr: learning rate.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: coefficient of the decoupled weight decay.
        maximize: whether to ascend the gradient instead of descending it.

    Returns:
        The new parameter.
    """
    state.t += 1
    theta = p.detach().clone()
    gradient = (-g if maximize else g).detach()

    theta = theta - lr * weight_decay * theta
    state.m = beta1 * state.m + (1 - beta1) * gradient
    m_hat = state.m / (1 - beta1**state.t)
    squares = gradient.to(state.r.dtype) ** 2
    state.r = beta2 * state.r + (1 - beta2) * squares.mean(1)
    state.c = beta2 * state.c + (1 - beta2) * squares.mean(0)
    mean = state.r.mean()
    v = torch.outer(state.r, state.c) / mean if mean > 0 else torch.zeros_like(squares)
    v_hat = v / (1 - beta2**state.t)
    return theta - lr * m_hat / (v_hat.sqrt() + eps).to(theta.dtype)
