"""Adam-mini as the paper writes it: one block at a time, every symbol under the paper's name.

This reference is simple and slow. The tests compare every other implementation of the step with it.

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
