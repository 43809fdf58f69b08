"""Blocks of the Gauss-Newton matrices of the tiny models of ``make hessian``, as quadratic problems."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data import load
from experiments.storage import write_atomic
from experiments.studies.hessian_maps.settings import PROFILES, subjects
from experiments.studies.hessian_maps.subjects import Batch, Subject
from experiments.studies.paper_hessian.problems import Problem, starts_at
from hessian import GGNOperator, dense
from hessian.parts import WeightPart, weight_parts
from optimizer import Rules

MODELS = {"full": ("gpt", "llama"), "smoke": ("gpt",)}
"""The models of each profile."""
DAMPING = 1e-4
"""Added to the diagonal as a share of its mean: Gauss-Newton blocks of few examples are singular."""
CHECKPOINTS = (0.0, 1.0)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch[0])
    return logits


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


@functools.cache
def _trained(profile: str, steps: int, name: str, seed: int) -> tuple[Subject, np.ndarray]:
    """Return a tiny model's subject and its flat parameters at ``CHECKPOINTS``, [2, n]."""
    subject = Subject(name, subjects(profile)[name], load("python-stdlib-8"), PROFILES[profile])
    theta = subject.train("elementwise", steps, seed, snapshots=CHECKPOINTS)["theta"]
    return subject, theta


def gauss_newton(
    profile: str, steps: int, name: str, seed: int, checkpoint: int, cache: Path
) -> tuple[nn.Module, Tensor]:
    """Return a tiny model and its Gauss-Newton matrix [n, n]; the matrix comes from the cache if it is there.

    Args:
        profile: profile of ``make hessian``.
        steps: training steps.
        name: "gpt" or "llama".
        seed: seed of the weights and the batches.
        checkpoint: index into ``CHECKPOINTS``.
        cache: folder of stored matrices.
    """
    subject, theta = _trained(profile, steps, name, seed)
    model = subject.model_at(theta[checkpoint])
    path = cache / f"ggn-{profile}-{steps}-{name}-{seed}-{checkpoint}.f32"
    n = theta.shape[1]
    if not path.is_file():
        operator = GGNOperator(model, _logits, _cross_entropy, None, subject.fixed(1))
        write_atomic(path, dense(operator).to(torch.float32).numpy().tobytes())
    flat = torch.from_numpy(np.fromfile(path, dtype=np.float32))
    return model, flat.reshape(n, n).to(torch.float64)


def _inside(model: nn.Module, matrix: Tensor, part: WeightPart) -> Tensor:
    """Return the damped block of one weight matrix, [elements, elements], its elements row-major."""
    start = 0
    for name, parameter in model.named_parameters():
        if name == part.parameter:
            break
        start += parameter.numel()
    where = start + part.index.flatten()
    block = matrix[where][:, where]
    block = 0.5 * (block + block.T)
    return block + DAMPING * block.diagonal().mean() * torch.eye(len(block), dtype=block.dtype)


def problems(profile: str, steps: int, seed: int, cache: Path) -> list[Problem]:
    """Return one random block of Adam-mini's partition from every weight matrix, before and after training."""
    units, out = Rules("adam_mini").units, []
    generator = torch.Generator().manual_seed(90_000 + seed)
    for name in MODELS[profile]:
        for checkpoint, share in enumerate(CHECKPOINTS):
            model, matrix = gauss_newton(profile, steps, name, seed, checkpoint, cache)
            for part in weight_parts(model):
                ids = part.candidates()[units[part.role].value]
                whole = _inside(model, matrix, part)
                # The rows of tokens that do not occur are zero; they are no problems.
                alive = [b for b in ids.unique().tolist() if float(whole.diagonal()[ids == b].min()) > 1e-12]
                if not alive:
                    continue
                block = alive[int(torch.randint(len(alive), (1,), generator=generator))]
                inner = whole[ids == block][:, ids == block]
                inner = inner / torch.linalg.eigvalsh(inner)[-1]
                label = f"{name} {part.role.value} of {part.parameter}, {share:.0%} of training"
                out.append(Problem(f"real {name}", label, inner, starts_at(len(inner), generator)))
    return out


def whole_matrices(profile: str, steps: int, seed: int, cache: Path) -> list[tuple[Problem, tuple[int, int]]]:
    """Return the whole query, value and attention-output matrices of the trained tiny GPT, with their shapes."""
    out = []
    generator = torch.Generator().manual_seed(95_000 + seed)
    model, matrix = gauss_newton(profile, steps, "gpt", seed, len(CHECKPOINTS) - 1, cache)
    for part in weight_parts(model):
        role = part.role.value
        if role in ("QUERY", "VALUE", "ATTENTION_OUT"):
            block = _inside(model, matrix, part)
            block = block / torch.linalg.eigvalsh(block)[-1]
            problem = Problem(f"real {role}", "gpt, trained", block, starts_at(len(block), generator))
            out.append((problem, part.shape))
    return out
