"""Numbers that describe what sharing second moments does, all computed from v, Adam's second moment of every element.

A form of sharing replaces v by u: the mean of v in the element's block (``block_means``), or the product of a row mean
and a column mean (``rank_one``). Adam moves an element at the rate lr / sqrt(v), sharing at lr / sqrt(u), so

    s = sqrt(v / u)

is the ratio of the two: above 1, the element moves faster than under Adam. Every criterion below is zero if u = v, and
larger values mean that sharing is expected to cost more. docs/role_study.md compares them with training runs.

All tensors are second moments: positive and finite (``floored`` sees to it), of any shape unless the function says so.
v and u of several tensors can be flattened and concatenated, because every criterion is a mean or a sum over elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .probing import check_block_ids

FLOOR = 1e-6
"""Second moments below this share of their tensor's mean are raised to it: a factor of 1,000 in the learning rate."""
FAST = 2.0
"""An element is fast if it moves at more than this multiple of Adam's own rate."""


def floored(v: Tensor) -> Tensor:
    """Return second moments as float64, each raised to at least ``FLOOR`` of their mean.

    Args:
        v: second moments (mean squared gradients) of one tensor, any shape, non-negative.

    Raises:
        TypeError: v is not a tensor.
        ValueError: a second moment is negative or not finite, or all are zero.
    """
    if not isinstance(v, Tensor):
        raise TypeError(f"v is a {type(v).__name__}; it must be a tensor of second moments")
    wide = v.detach().to(torch.float64)
    if not bool(torch.isfinite(wide).all()) or bool((wide < 0).any()) or not bool((wide > 0).any()):
        raise ValueError("v must be finite, non-negative and not all zero; pass mean squared gradients of some batches")
    return wide.clamp_min(FLOOR * float(wide.mean()))


def block_means(v: Tensor, block_ids: Tensor) -> Tensor:
    """Return every element's shared second moment if blocks share one: the mean of its block, in the shape of v.

    Args:
        v: second moments, any shape.
        block_ids: int64, as many elements as v; the block of every element, numbered 0, 1, ...

    Raises:
        TypeError: block_ids is not a tensor.
        ValueError: the sizes differ, or the ids are not int64 or skip a number.
    """
    return _block_means(v.reshape(-1), _checked_ids(v, block_ids)).reshape(v.shape)


def rank_one(v: Tensor) -> Tensor:
    """Return every element's second moment if it is factored: r_i c_j / mean(r), in the shape of v.

    This is Adafactor's second moment (Shazeer and Stern, arXiv 1804.04235) of row means r and column means c.

    Args:
        v: second moments of a matrix, [rows, columns].

    Raises:
        ValueError: v is not a matrix.
    """
    _require_matrix(v)
    rows, columns = v.mean(1, keepdim=True), v.mean(0, keepdim=True)
    return rows * columns / rows.mean()


def log_gap(v: Tensor, u: Tensor) -> float:
    """Return mean(log u - log v) in nats: twice the mean log ratio of Adam's rate to the shared one.

    For block means this is the Jensen gap, which is never negative. For ``rank_one`` it can be: where r_i c_j is below
    v_ij, elements move too fast, and the mean counts that as a gain. ``stein`` has no such sign.

    Args:
        v: second moments.
        u: shared second moments, of the same shape.

    Raises:
        ValueError: the shapes differ, or an entry is not positive and finite.
    """
    v, u = _pair(v, u)
    return float((u.log() - v.log()).mean())


def stein(v: Tensor, u: Tensor) -> float:
    """Return Stein's loss mean(s^2 - 1 - 2 log s), the Itakura-Saito divergence of v from u, in nats.

    It equals ``log_gap`` for block means, because s^2 then has the mean 1 in every block. It is never negative.

    Args:
        v: second moments.
        u: shared second moments, of the same shape.

    Raises:
        ValueError: the shapes differ, or an entry is not positive and finite.
    """
    v, u = _pair(v, u)
    ratio = v / u
    return float((ratio - 1 - ratio.log()).mean())


def step_cost(v: Tensor, u: Tensor, lr: float) -> float:
    """Return the gain of one step that sharing loses in a diagonal quadratic model, in nats summed over elements.

    Suppose that Adam's step ends exactly in the minimum along every element. Its curvature is then sqrt(v) / lr, its
    distance to the minimum lr, and the step gains lr sqrt(v) / 2. A step of s times the length leaves the share
    (s - 1)^2 of that: lr / 2 * sum sqrt(v) (s - 1)^2. Off-diagonal curvature, momentum and noise are ignored.

    Args:
        v: second moments.
        u: shared second moments, of the same shape.
        lr: learning rate.

    Raises:
        ValueError: the shapes differ, or an entry is not positive and finite.
    """
    v, u = _pair(v, u)
    return 0.5 * lr * float((v.sqrt() * ((v / u).sqrt() - 1).square()).sum())


def relative_step(v: Tensor, u: Tensor) -> float:
    """Return ``step_cost`` as a share of what Adam's step gains: sum sqrt(v) (s - 1)^2 / sum sqrt(v).

    Args:
        v: second moments.
        u: shared second moments, of the same shape.

    Raises:
        ValueError: the shapes differ, or an entry is not positive and finite.
    """
    return step_cost(v, u, 2.0) / float(v.to(torch.float64).sqrt().sum())


def overshoot(v: Tensor, u: Tensor, lr: float) -> float:
    """Return the part of ``step_cost`` from elements that move too fast: lr / 2 * sum sqrt(v) max(s - 1, 0)^2, in nats.

    Rates that are too high make training unstable; rates that are too low make it slow.

    Args:
        v: second moments.
        u: shared second moments, of the same shape.
        lr: learning rate.

    Raises:
        ValueError: the shapes differ, or an entry is not positive and finite.
    """
    v, u = _pair(v, u)
    return 0.5 * lr * float((v.sqrt() * ((v / u).sqrt() - 1).clamp_min(0).square()).sum())


def fast_energy(v: Tensor, u: Tensor, limit: float = FAST) -> float:
    """Return the update energy of elements with s > ``limit``: the sum of their s^2.

    Adam's update has the energy E[g^2 / v] = 1 in every element; under sharing it is s^2.

    Args:
        v: second moments.
        u: shared second moments, of the same shape.
        limit: multiple of Adam's own rate.

    Raises:
        ValueError: the shapes differ, or an entry is not positive and finite.
    """
    v, u = _pair(v, u)
    energy = v / u
    return float(energy[energy > limit * limit].sum())


def fast_share(v: Tensor, u: Tensor, limit: float = FAST) -> float:
    """Return ``fast_energy`` as a share of the update energy of all elements, in [0, 1].

    Args:
        v: second moments.
        u: shared second moments, of the same shape.
        limit: multiple of Adam's own rate.

    Raises:
        ValueError: the shapes differ, or an entry is not positive and finite.
    """
    return fast_energy(v, u, limit) / float((v.to(torch.float64) / u.to(torch.float64)).sum())


def unexplained(v: Tensor, block_ids: Tensor | None) -> float:
    """Return the share of the variance of log v that sharing cannot represent, in [0, 1].

    It is 1 / (1 + SNR), where SNR is the variance of log v between blocks over that within. For factored sharing, the
    residual of row effects plus column effects takes the place of the variance within. It is zero if v is constant.

    Args:
        v: second moments of one tensor; a matrix [rows, columns] if factored.
        block_ids: int64, as many elements as v; None for factored.

    Raises:
        ValueError: the ids do not fit, v is no matrix although factored, or an entry is not positive and finite.
    """
    v, _ = _pair(v, v)
    logs = v.log()
    if block_ids is None:
        _require_matrix(v)
        fitted = logs.mean(1, keepdim=True) + logs.mean(0, keepdim=True) - logs.mean()
    else:
        fitted = block_means(logs, block_ids)
    total = float((logs - logs.mean()).square().mean())
    return float((logs - fitted).square().mean()) / total if total > 1e-20 else 0.0


def slim_noise(v: Tensor, block_ids: Tensor | None) -> float:
    """Return one over SlimAdam's signal-to-noise ratio, the mean over blocks of mean(v)^2 / var(v) (arXiv 2503.01843).

    SlimAdam defines the ratio for an axis; a block takes the place of the elements along it. Factored sharing has no
    blocks: there, v / u takes the place of v in one block.

    Args:
        v: second moments of one tensor; a matrix [rows, columns] if factored.
        block_ids: int64, as many elements as v; None for factored.

    Raises:
        ValueError: the ids do not fit, v is no matrix although factored, or an entry is not positive and finite.
    """
    v, _ = _pair(v, v)
    if block_ids is None:
        v, ids = (v / rank_one(v)).reshape(-1), torch.zeros(v.numel(), dtype=torch.int64)
    else:
        v, ids = v.reshape(-1), _checked_ids(v, block_ids)
    sizes = torch.bincount(ids)
    sums = torch.zeros(len(sizes), dtype=torch.float64)
    mean = sums.index_add(0, ids, v) / sizes
    variance = sums.index_add(0, ids, (v - mean[ids]).square()) / sizes
    # A block of one element, or of equal ones, has no noise; the limit keeps the mean over blocks finite, as in `snr`.
    ratio = (mean.square() / variance.clamp_min(1e-300)).clamp_max(1e12)
    return 1.0 / float(ratio.mean())


def _block_means(flat: Tensor, ids: Tensor) -> Tensor:
    """Return the mean of each element's block, [n]; the ids are checked."""
    sizes = torch.bincount(ids).to(flat.dtype)
    return (torch.zeros_like(sizes).index_add_(0, ids, flat) / sizes)[ids]


def _checked_ids(v: Tensor, block_ids: Tensor) -> Tensor:
    """Return the block ids as int64 [n] after checking them against v."""
    if not isinstance(block_ids, Tensor):
        raise TypeError(f"block_ids is a {type(block_ids).__name__}; it must be an int64 tensor, one id per element")
    ids = block_ids.reshape(-1)
    if v.numel() != ids.numel():
        raise ValueError(f"v has {v.numel()} elements but block_ids has {ids.numel()}; give one id per element")
    check_block_ids(ids, ids.numel())
    return ids


def _require_matrix(v: Tensor) -> None:
    if v.dim() != 2:
        raise ValueError(f"v has shape {tuple(v.shape)}; a factored second moment needs a matrix [rows, columns]")


def _pair(v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return v and u as float64 after checking them."""
    if v.shape != u.shape:
        raise ValueError(f"v has shape {tuple(v.shape)} and u {tuple(u.shape)}; u must have one entry per element of v")
    for name, tensor in (("v", v), ("u", u)):
        if not bool(torch.isfinite(tensor).all()) or bool((tensor <= 0).any()):
            raise ValueError(f"{name} has entries that are not positive and finite; pass second moments from `floored`")
    return v.to(torch.float64), u.to(torch.float64)
