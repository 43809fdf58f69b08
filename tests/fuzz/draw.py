"""Random cases: layouts (factored ones too), tensors of some dtype and strides, flags. One seed, one case."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optimizer import Layout
from optimizer.partition import FactoredLayout, Runs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST = 3_000_000  # blocks times elements: what the reference, a loop over blocks, costs
STRIDES = ("plain", "transposed", "gapped", "channels_last", "offset", "expanded")
_DENSE = ("plain", "offset")
ENGINES: tuple[dict[str, Any], ...] = (
    {}, {"fused": True}, {"fused": False}, {"foreach": True}, {"differentiable": True}, {"compiled": True},
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What one run of the fuzzer does.

    Attributes:
        seed: that it was drawn from, and the tensors' too.
        tensors: (layout, shape, strides of the parameter, strides of its gradient) each.
        dtype: of parameters and gradients.
        engine: flags; "compiled" for ``torch.compile``.
        options: hyper-parameters and how state is kept.
        gradient: size of the gradients.
        steps: to take.
        scale: of the gradients, as a GradScaler hands it over; None for no scaler.
        missing: (step, tensor) pairs without a gradient.
        reload: step before which the state goes through ``state_dict``; -1 for never.
    """

    seed: int
    tensors: list[tuple[Layout | FactoredLayout, tuple[int, ...], str, str]]
    dtype: torch.dtype
    engine: dict[str, Any]
    options: dict[str, Any]
    gradient: float
    steps: int
    scale: float | None = None
    missing: set[tuple[int, int]] = field(default_factory=set)
    reload: int = -1


def draw(seed: int) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    dtype, engine = r.choice(DTYPES), dict(ENGINES[5] if r.random() < 0.003 else r.choice(ENGINES[:5]))
    large = r.random() < 0.2
    tensors = []
    for _ in range(r.randint(1, 4)):
        draw_one = _factored if r.random() < 0.25 else _layout
        layout, shape = draw_one(r, large)
        while layout.n_blocks * math.prod(shape) > _MOST:
            layout, shape = draw_one(r, large)
        tensors.append((layout, shape, r.choice(STRIDES[:-1]), r.choice(STRIDES)))
    plain = engine.get("differentiable")
    options: dict[str, Any] = {
        "lr": r.choice((1e-2, 1e-3, 0.0)), "betas": r.choice(((0.9, 0.95), (0.0, 0.5), (0.9, 0.999))),
        "eps": r.choice((1e-8, 1e-3)), "weight_decay": r.choice((0.0, 0.1)), "maximize": r.random() < 0.3,
        "exp_avg_dtype": None if plain else r.choice((None, None, torch.float32, "int8", "int4")),
        "bf16_rounding": None if plain or dtype != torch.bfloat16 else r.choice((None, "stochastic", "kahan")),
    }  # fmt: skip
    if options["exp_avg_dtype"] == torch.float32 and dtype == torch.float64:
        options["exp_avg_dtype"] = None
    if options["bf16_rounding"] and options["lr"] == 0.0 and options["weight_decay"] == 0.0:
        options["lr"] = 1e-2
    if isinstance(options["exp_avg_dtype"], str) and engine.get("fused"):
        engine = {}  # fused=True refuses quantised moments of strided tensors
    if engine.get("fused") and any(isinstance(t[0], FactoredLayout) and t[2] not in _DENSE for t in tensors):
        engine = {}  # and factored tensors with gaps, or with leading axes inside others
    steps = r.randint(1, 4)
    missing = {(s, t) for s in range(steps) for t in range(len(tensors)) if r.random() < 0.1}
    gradient = r.choice((1.0, 1e-4, 6e4 if dtype == torch.float16 else 1e6))
    scale = r.choice((None, None, 8.0)) if engine.get("fused") and gradient <= 1 else None
    return Case(seed, tensors, dtype, engine, options, gradient, steps, scale, missing, r.choice((-1, -1, 1)))


def _layout(r: random.Random, large: bool) -> tuple[Layout, tuple[int, ...]]:
    """Any axis, leading axes, repeated patterns, axis 0 in pieces; now and then empty, 0-dim, or of some size."""
    kind = r.random()
    if kind < 0.03:
        return Layout.per_element(()), ()
    if kind < 0.06:
        return Layout(0, []), (0, 3)
    most = 40 if large else 4
    pattern = [(r.randint(1, most), r.randint(1, 3)) for _ in range(r.randint(1, 4))]
    runs = Runs(tuple(pattern), r.randint(1, 3))
    behind = tuple(r.randint(1, 60 if large else 5) for _ in range(r.randint(0, 2)))
    before = tuple(r.randint(1, 5) for _ in range(r.randint(0, 2)))
    leading = r.randint(0, len(before))
    shape = (*before, runs.total, *behind)
    if kind < 0.2:
        return Layout.per_element(shape), shape
    return layout_around(runs, before, behind, leading, r.choice((1, 1, 1, 2, 3)))


def _factored(r: random.Random, large: bool) -> tuple[FactoredLayout, tuple[int, ...]]:
    """Rows along any axis, in parts that may return, with leading axes, axis 0 in pieces; columns along the others."""
    most = 40 if large else 4
    parts = r.randint(1, 3)
    order = [*range(parts), *(r.randrange(parts) for _ in range(r.randint(0, 2)))]
    r.shuffle(order)
    segments, repeat, fold = [(part, r.randint(1, most)) for part in order], r.randint(1, 2), r.choice((1, 1, 1, 2, 3))
    behind = tuple(r.randint(1, 60 if large else 5) for _ in range(r.randint(0, 2)))
    before = tuple(r.randint(1, 5) for _ in range(r.randint(0, 2)))
    leading = r.randint(0, len(before))
    shape = (*before, repeat * sum(length for _, length in segments), *behind)
    axis, leading = (len(before), leading) if fold == 1 else (len(before) + 1, leading + 1)
    shape = (fold * shape[0], *shape[1:])
    layout = FactoredLayout(shape, axis, segments, repeat=repeat, parts=parts, leading=leading, fold=fold)
    return layout, shape


def layout_around(
    runs: Runs, before: tuple[int, ...], behind: tuple[int, ...], leading: int, fold: int
) -> tuple[Layout, tuple[int, ...]]:
    """A layout and its shape: runs along an axis that stands between others, axis 0 in ``fold`` pieces."""
    shape = (*before, runs.total, *behind)
    if fold == 1:
        return Layout(len(before), runs, before[:leading]), shape
    return Layout(len(before) + 1, runs, (fold, *before[:leading]), fold=fold), (fold * shape[0], *shape[1:])


def strided(x: Tensor, how: str) -> Tensor:
    """The values of x under other strides; "expanded" repeats its first slice."""
    if how == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "gapped":
        return torch.stack([x, -x], dim=-1)[..., 0]
    if how == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if how == "offset":
        return torch.cat([torch.zeros(3, dtype=x.dtype), x.flatten()])[3:].view(x.shape)
    if how == "expanded" and x.dim() and x.shape[0]:
        return x[:1].expand_as(x)
    return x
