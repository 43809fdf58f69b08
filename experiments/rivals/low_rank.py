"""Rivals whose moments of hidden matrices live in a space of low rank: GaLore and APOLLO-Mini."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from .installed import pytorch_optimizer
from .parts import Exact, Parts, State, adamw
from .rival import Group, Setup

GALORE = {"rank": 32, "update_proj_gap": 50, "scale": 0.25, "projection_type": "std"}
"""Rank: a quarter of the 0.9M model's width, the paper's share at 1B parameters (512 of 2048). The paper renews the
projection every 200 steps of tens of thousands; a run of 400 steps renews it every 50."""


class GaLoreParts(Parts):
    """GaLore and AdamW; the projections are saved as tensors.

    pytorch_optimizer keeps a projection as a Python object in the state. A checkpoint then holds a pickled object, and
    an optimizer that loads a state dict shares the object with the one that made it.
    """

    def packed(self, state: State) -> State:
        """Replace the projection by its matrix."""
        projector = state.pop("projector", None)
        return state if projector is None else {**state, "projection": projector.ortho_matrix}

    def unpacked(self, saved: State, parameter: Tensor, group: Group) -> State:
        """Make the projection from what ``packed`` returned."""
        if "projection" in saved:
            projector = projections().GaLoreProjector(**{key: group[key] for key in GALORE})
            projector.ortho_matrix = saved.pop("projection")
            saved["projector"] = projector
        return saved


def projections() -> Any:
    """Return the module of pytorch_optimizer that has the projection."""
    return pytorch_optimizer().optimizer.utils.galore


def galore(setup: Setup) -> torch.optim.Optimizer:
    """Make pytorch_optimizer's GaLore for hidden matrices, AdamW for the rest.

    The projection is the leading singular vectors of a gradient, so nothing is random. At a renewal the moments stay as
    they are, though they belong to another basis, as in the paper.
    """
    library = pytorch_optimizer()
    hidden, rest = setup.split(setup.hidden())
    make = lambda groups: library.GaLore([{**g, **GALORE} for g in groups], betas=setup.betas)  # noqa: E731
    return GaLoreParts([(hidden, make), (rest, adamw(setup.betas))], setup.lr)


class ApolloMini(Exact):
    """APOLLO-Mini (arXiv 2412.05270): a whole gradient, scaled by one number from Adam's moments in rank one.

    A matrix G [rows, columns] is projected on a random vector along its shorter side. Adam's moments of the projected
    gradient r [longer side] give an update n. The step is ``lr * sqrt(scale) * |n| / |r| * G``, where Adam's correction
    of both biases multiplies lr, and where the norm of the scaled gradient grows by at most one percent in a step.

    pytorch_optimizer 4.1.0's ``APOLLO`` scales the projected gradient and projects it back, so its updates have rank
    one and are not those of the paper; this class is written from the paper and the authors' code.

    Vectors are drawn from (seed, place of the parameter, number of the renewal), on the CPU, and are not stored.

    Args:
        groups: groups of matrices with ``weight_decay``.
        lr: learning rate.
        betas: decay rates of the two moments.
        seed: the run's seed.
        scale: the paper's alpha, which is under a square root.
        gap: steps between new random vectors.
    """

    def __init__(
        self,
        groups: list[Group],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        seed: int,
        scale: float = 128.0,
        gap: int = 200,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0, "scale": scale, "gap": gap})
        self._seed = seed

    def update_all(self) -> None:
        """Update all matrices that have a gradient."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, place)
                place += 1

    def vector(self, like: Tensor, place: int, renewal: int) -> Tensor:
        """Return a random vector for one side of a matrix, [shorter side]."""
        words = f"apollo {self._seed} {place} {renewal}"
        seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(min(like.shape), generator=generator).to(like)

    def _update(self, parameter: Tensor, grad: Tensor, group: Group, place: int) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = grad.new_zeros(max(grad.shape))
            state["exp_avg_sq"] = grad.new_zeros(max(grad.shape))
            state["scaled_norm"] = grad.new_zeros(1)
        vector = self.vector(grad, place, int(state["step"]) // group["gap"])
        state["step"] += 1
        step = int(state["step"])
        low = grad @ vector if grad.shape[0] >= grad.shape[1] else vector @ grad
        state["exp_avg"].lerp_(low, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(low, low, value=1 - beta2)
        normed = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(1e-6)
        scaled = grad * (normed.norm() / (low.norm() + 1e-8))
        norm, before = scaled.norm(), state["scaled_norm"]
        if step > 1 and before > 0:
            limit = (norm / (before + 1e-8)).clamp(min=1.01) / 1.01
            scaled, norm = scaled / limit, norm / limit
        before.copy_(norm)
        correction = math.sqrt(1 - beta2**step) / (1 - beta1**step)
        parameter.add_(scaled, alpha=-group["lr"] * correction * math.sqrt(group["scale"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def apollo_mini(setup: Setup) -> torch.optim.Optimizer:
    """Make APOLLO-Mini for hidden matrices, AdamW for the rest."""
    hidden, rest = setup.split(setup.hidden())
    make = lambda groups: ApolloMini(groups, setup.lr, setup.betas, seed=setup.seed)  # noqa: E731
    return Parts([(hidden, make), (rest, adamw(setup.betas))], setup.lr)
