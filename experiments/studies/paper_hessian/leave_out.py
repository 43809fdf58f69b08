"""Part ``leave_out``: AdamW everywhere but in one to three left-out blocks, which have one searched rate each."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data import batch_at, fixed_batches, load
from experiments.models import LlamaConfig, build, lm_loss
from experiments.studies.paper_hessian.store import Cell, Part, settings_of
from optimizer import AdamMini, partition

BETAS, WEIGHT_DECAY, CLIP, WARMUP = (0.9, 0.95), 0.1, 1.0, 0.1
LEVELS = ("block", "matrix")
"""What is left out: a block of Adam-mini's partition (a head, a row or a token), or a whole weight matrix."""
KINDS = ("one rate", "AdamW's rates")
"""The arm of the paper, and the control that searches a factor of AdamW's own rates in the same elements."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the part.

    Attributes:
        dim: width of the Transformer.
        layers: its depth.
        hidden: its feed-forward width.
        steps: training steps.
        rows: sequences per step.
        length: bytes per sequence.
        lr: peak learning rate of AdamW.
        data: the corpus.
        left_out: largest number of left-out blocks.
        factors: searched rates: multiples of lr / sqrt(mean v of the block) for one rate, of lr for the control.
        seeds: seeds of weights, batches and of the choice of blocks.
        eval_batches: held-out batches; the first half chooses rates, the second half is reported.
    """

    dim: int = 32
    layers: int = 4
    hidden: int = 96
    steps: int = 150
    rows: int = 8
    length: int = 32
    lr: float = 1e-2
    data: str = "python-stdlib"
    left_out: int = 3
    factors: tuple[float, ...] = (0.125, 0.35, 1.0, 2.8, 8.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_batches: int = 32


PROFILES = {
    "full": Settings(),
    "smoke": Settings(
        dim=8, layers=1, hidden=8, steps=6, rows=2, length=8, left_out=2, factors=(0.5, 1.0, 2.0), seeds=(0, 1),
        eval_batches=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """Elements that do not follow AdamW.

    Attributes:
        parameter: name of the parameter.
        index: positions in the flattened parameter, int64 [k].
        factor: searched multiple.
        kind: one of ``KINDS``.
    """

    parameter: str
    index: Tensor
    factor: float
    kind: str


def part(profile: str) -> Part:
    """Return the part of a profile."""
    s = PROFILES[profile]
    runs = s.left_out * len(s.factors) + 1
    seconds = runs * 0.0009 * s.steps * s.layers * (1 + s.dim / 32)
    cells = [
        Cell(f"{level}, {kind}, seed {seed}", seconds, lambda lv=level, k=kind, n=seed: search(s, lv, k, n))
        for level in LEVELS
        for seed in s.seeds
        for kind in KINDS
    ]
    return Part("leave_out", settings_of(s), cells)


def config(settings: Settings) -> LlamaConfig:
    """Return the Transformer of the study."""
    return LlamaConfig(dim=settings.dim, n_layers=settings.layers, n_heads=4, n_kv_heads=2, hidden=settings.hidden)


def choose(settings: Settings, level: str, seed: int) -> list[tuple[str, Tensor, str]]:
    """Return the blocks to leave out, in the order in which they are: (parameter, positions, label) each.

    A weight matrix is drawn first, each at most once, then a block of it, so that matrices of many small blocks are not
    chosen more often. Embedding and output layer count; norms do not, since Adam-mini already gives them one scalar.
    """
    model, generator = build(config(settings), seed), torch.Generator().manual_seed(300 + seed)
    layouts = partition(model)
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    out = []
    for i in torch.randperm(len(names), generator=generator)[: settings.left_out].tolist():
        name = names[i]
        shape = model.get_parameter(name).shape
        ids = layouts[name].block_ids(shape).flatten()
        block = int(torch.randint(int(ids.max()) + 1, (1,), generator=generator))
        if level == "block":
            out.append((name, (ids == block).nonzero()[:, 0], f"{name}, block {block}"))
        else:
            out.append((name, torch.arange(ids.numel()), name))
    return out


def search(settings: Settings, level: str, kind: str, seed: int) -> dict[str, Any]:
    """Leave out one block after the other; each has its rate searched while the rates before it stay.

    Returns:
        ``adamw`` (the reported loss of AdamW without left-out blocks), and ``rows``: for every number of left-out
        blocks the chosen factor, whether it is strictly inside the grid, the reported loss at it, the loss on the half
        that chose, and all losses of that half (None where a run diverged), with the label of the block added last.
    """
    base = before = adamw(settings, seed)
    chosen, rows = [], []
    for name, index, label in choose(settings, level, seed):
        found = []
        for factor in settings.factors:
            left_out = [*chosen, LeftOut(name, index, factor, kind)]
            # With a factor of 1, a control's block follows AdamW: nothing has changed since the block before.
            unchanged = kind == KINDS[1] and factor == 1.0
            run = before if unchanged else train(settings, seed, left_out, base["moments"])
            found.append((run, left_out[-1]))
        losses = [run["choosing"] for run, _ in found]
        at = min(range(len(losses)), key=lambda i: losses[i])
        before, best = found[at]
        chosen.append(best)
        rows.append(
            {
                "added": label,
                "elements": len(index),
                "factor": best.factor,
                "inside": 0 < at < len(losses) - 1,
                "loss": before["reported"],
                "choosing": before["choosing"],
                "searched": losses,
            }
        )
    return {"adamw": base["reported"], "adamw_choosing": base["choosing"], "rows": rows}


@functools.cache
def adamw(settings: Settings, seed: int) -> dict[str, Any]:
    """Return ``train`` without left-out blocks, which all cells of a seed compare with."""
    return train(settings, seed, ())


def train(
    settings: Settings, seed: int, left_out: Sequence[LeftOut], moments: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Train the Transformer once.

    Args:
        settings: sizes.
        seed: seed of weights and batches.
        left_out: elements that do not follow AdamW.
        moments: name -> AdamW's second moments averaged over its own run; needed for one rate.

    Returns:
        ``choosing`` and ``reported``, the held-out losses of the two halves in nats (infinite after divergence), and
        ``moments``, name -> second moments averaged over the steps after the warm-up, zero with left-out blocks.
    """
    corpus, model = load(settings.data), build(config(settings), seed)
    optimizer = AdamMini(model, settings.lr, BETAS, weight_decay=WEIGHT_DECAY, rules="elementwise")
    named, decays = dict(model.named_parameters()), _decays(model, optimizer)
    rates = [_rate(settings, group, moments) for group in left_out]
    average = {name: torch.zeros_like(p) for name, p in named.items()}
    warm = max(1, round(WARMUP * settings.steps))
    for step in range(settings.steps):
        lm_loss(model, batch_at(corpus.train, seed, step, settings.rows, settings.length)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        schedule = min((step + 1) / warm, (settings.steps - step) / max(1, settings.steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * schedule
        before = [named[g.parameter].detach().flatten()[g.index].clone() for g in left_out]
        optimizer.step()
        for old, group, rate in zip(before, left_out, rates, strict=True):
            _override(named[group.parameter], optimizer, group, old, rate, schedule, step, decays[group.parameter])
        optimizer.zero_grad()
        if step >= warm and not left_out:
            for name, p in named.items():
                v = optimizer.state[p]["exp_avg_sq"].reshape(p.shape)
                average[name] += v / (1 - BETAS[1] ** (step + 1)) / (settings.steps - warm)
    with torch.no_grad():
        batches = fixed_batches(corpus.validation, settings.eval_batches, settings.rows, settings.length)
        losses = [lm_loss(model, batch).item() for batch in batches]
    half = len(losses) // 2
    halves = (sum(losses[::2]) / (len(losses) - half), sum(losses[1::2]) / half)
    choosing, reported = (loss if math.isfinite(loss) else math.inf for loss in halves)
    return {"choosing": choosing, "reported": reported, "moments": average}


def _decays(model: nn.Module, optimizer: AdamMini) -> dict[str, float]:
    """Return the weight decay of every parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def _rate(settings: Settings, group: LeftOut, moments: Mapping[str, Tensor] | None) -> float:
    """Return the peak rate of a left-out block: a rate for the momentum, or a factor of AdamW's own step.

    Raises:
        ValueError: one rate is asked for without AdamW's second moments, from which its grid is built.
    """
    if group.kind != KINDS[0]:
        return group.factor
    if moments is None:
        raise ValueError(f"kind={group.kind!r} needs moments: train AdamW first and pass its averaged second moments")
    mean = float(moments[group.parameter].flatten()[group.index].mean())
    return group.factor * settings.lr / math.sqrt(mean) if mean > 0 else 0.0


@torch.no_grad()
def _override(
    parameter: nn.Parameter,
    optimizer: AdamMini,
    group: LeftOut,
    old: Tensor,
    rate: float,
    schedule: float,
    step: int,
    decay: float,
) -> None:
    """Replace AdamW's step in the left-out elements by theirs; the decoupled weight decay stays AdamW's."""
    lr = optimizer.param_groups[0]["lr"]
    decayed = old * (1 - lr * decay)
    flat = parameter.view(-1)
    if group.kind == KINDS[0]:
        momentum = optimizer.state[parameter]["exp_avg"].reshape(-1)[group.index] / (1 - BETAS[0] ** (step + 1))
        flat[group.index] = decayed - rate * schedule * momentum
    else:
        flat[group.index] = decayed + rate * (flat[group.index] - decayed)
