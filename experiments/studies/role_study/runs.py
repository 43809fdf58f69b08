"""One run of the study, and its files: a JSON file per cell, rewritten atomically after every run."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data import Corpus, batch_at, fixed_batches
from experiments.fields import document_of
from experiments.models import lm_loss
from experiments.storage import environment, read_json, write_atomic, write_json
from experiments.studies.role_study.cells import ADAMW, LENGTH, MODELS, ROWS, STEPS, TWIN, Cell, make_model
from optimizer import AdamMini, Rules

BETAS, WEIGHT_DECAY, CLIP, WARMUP = (0.9, 0.95), 0.1, 1.0, 0.1
PERTURBATION = 1e-6
"""Relative size of the random change of the twin's initial weights."""
EVAL_BATCHES = 32
AVERAGE_EVERY = 5
"""Steps between the second moments that are averaged; those of the warm-up are left out."""


def settings(model: str) -> dict[str, Any]:
    """Return what every run of a model shares, for the results.

    Args:
        model: key of ``MODELS``.
    """
    return {
        "model": document_of(MODELS[model]),
        "steps": STEPS,
        "rows": ROWS,
        "length": LENGTH,
        "betas": list(BETAS),
        "weight_decay": WEIGHT_DECAY,
        "clip": CLIP,
        "warmup": WARMUP,
        "perturbation": PERTURBATION,
        "eval_batches": EVAL_BATCHES,
    }


def rate(peak: float, step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then linear decay to zero."""
    warm = max(1, round(WARMUP * STEPS))
    return peak * min((step + 1) / warm, (STEPS - step) / max(1, STEPS - warm))


def run(cell: Cell, arm: str, rules: Rules, corpus: Corpus) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train one arm of a cell.

    Returns:
        (``final_val_loss`` in nats, None if the run diverged, and ``seconds``; for AdamW, parameter name -> second
        moment averaged over the run after its warm-up, of the parameter's shape, otherwise empty).
    """
    started = time.perf_counter()
    model = make_model(cell.model, cell.seed)
    if arm == TWIN:
        generator = torch.Generator().manual_seed(cell.seed)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + PERTURBATION * torch.randn(p.shape, generator=generator))
    optimizer = AdamMini(model, cell.lr, BETAS, weight_decay=WEIGHT_DECAY, rules=rules)
    average, averaged, warm = _zeros(optimizer) if arm == ADAMW else {}, 0, max(1, round(WARMUP * STEPS))
    for step in range(STEPS):
        loss = lm_loss(model, batch_at(corpus.train, cell.seed, step, ROWS, LENGTH))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(cell.lr, step)
        optimizer.step()
        optimizer.zero_grad()
        if average and step >= warm and step % AVERAGE_EVERY == 0:
            averaged += 1
            _accumulate(average, optimizer, 1 - BETAS[1] ** (step + 1))
    with torch.no_grad():
        batches = fixed_batches(corpus.validation, EVAL_BATCHES, ROWS, LENGTH)
        final = sum(lm_loss(model, batch).item() for batch in batches) / EVAL_BATCHES
    result = {
        "final_val_loss": final if math.isfinite(final) else None,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return result, {name: total / averaged for name, total in average.items()}


def _named(optimizer: AdamMini) -> list[tuple[str, nn.Parameter]]:
    """Return the names and parameters that an optimizer holds."""
    return [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]


def _zeros(optimizer: AdamMini) -> dict[str, Tensor]:
    return {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in _named(optimizer)}


def _accumulate(average: dict[str, Tensor], optimizer: AdamMini, correction: float) -> None:
    """Add the optimizer's second moments, divided by Adam's bias correction."""
    for name, p in _named(optimizer):
        average[name] += optimizer.state[p]["exp_avg_sq"].to(torch.float64) / correction


def load_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    """Read a cell's results so far; return a document without runs if it has not begun.

    Raises:
        ValueError: the file is damaged, or its runs had other settings; the message names the file.
    """
    path = folder / f"{cell.name}.json"
    document = read_json(path)
    if document is None:
        return {
            "cell": dataclasses.asdict(cell),
            "settings": settings(cell.model),
            "environment": environment(),
            "runs": {},
        }
    runs = document.get("runs") if isinstance(document, dict) else None
    if not isinstance(runs, dict) or not all(isinstance(r, dict) and "final_val_loss" in r for r in runs.values()):
        raise ValueError(
            f"{path} is damaged (it has no runs with a final_val_loss); move it away to run its cell again"
        )
    if document.get("settings") != settings(cell.model) or document.get("cell") != dataclasses.asdict(cell):
        raise ValueError(f"{path} holds runs of other settings; give another --out, or move it away")
    return document


def save_cell(folder: Path, cell: Cell, document: dict[str, Any]) -> None:
    """Write a cell's results atomically."""
    write_json(folder / f"{cell.name}.json", document)


def save_moments(cache: Path, cell: Cell, moments: dict[str, Tensor]) -> None:
    """Write a cell's averaged second moments atomically, as float32 arrays named by their parameters."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: v.to(torch.float32).numpy() for name, v in moments.items()})
    write_atomic(cache / f"{cell.name}.npz", buffer.getvalue())


def load_moments(cache: Path, cell: Cell) -> dict[str, Tensor] | None:
    """Read a cell's averaged second moments, float64 of the parameters' shapes; None if there is no file."""
    path = cache / f"{cell.name}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return {name: torch.from_numpy(stored[name]).to(torch.float64) for name in stored.files}
