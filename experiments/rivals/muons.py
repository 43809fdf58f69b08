"""Rivals that orthogonalise the momentum of hidden matrices and leave embeddings, output layer and vectors to AdamW.

All three scale the update of a matrix to an RMS of about 0.2 (arXiv 2502.16982), which is that of AdamW's updates, and
AdamW steps with the same rate: ``ADAMW_RATE`` is 1. Newton-Schulz iterations run in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .installed import pytorch_optimizer
from .parts import Parts, adamw
from .rival import Group, Setup

ADAMW_RATE = 1.0
"""Learning rate of AdamW's part, as a multiple of the run's."""


def _with_adamw(setup: Setup, make: Callable[[list[Group]], torch.optim.Optimizer]) -> Parts:
    hidden, rest = setup.split(setup.hidden())
    return Parts([(hidden, make), (rest, adamw(setup.betas))], setup.lr, scales=[1.0, ADAMW_RATE])


def muon(setup: Setup) -> torch.optim.Optimizer:
    """Make torch's Muon (momentum 0.95 with Nesterov), scaled by 0.2 sqrt(max(rows, columns)) as in 2502.16982.

    Raises:
        ValueError: torch is too old to have it.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"arm='muon' needs torch 2.9 or newer, and this is {torch.__version__}; use arm='normuon'")
    return _with_adamw(setup, lambda groups: torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw"))


def normuon(setup: Setup) -> torch.optim.Optimizer:
    """Make pytorch_optimizer's NorMuon in the form of the paper's Algorithm 1: rows of the update get equal RMS.

    The library's default keeps the norm of the orthogonal matrix instead, as the authors' code. It changes the
    gradients in place, which is harmless here, because they are set to None after the step.
    """
    library = pytorch_optimizer()
    return _with_adamw(
        setup, lambda groups: library.NorMuon([{**g, "use_muon": True} for g in groups], update_scale="match_rms")
    )


def adamuon(setup: Setup) -> torch.optim.Optimizer:
    """Make pytorch_optimizer's AdaMuon, which divides the orthogonal update by the root of its second moments.

    It orthogonalises the momentum; versions 2 and 3 of the paper orthogonalise its sign.
    """
    library = pytorch_optimizer()
    return _with_adamw(
        setup, lambda groups: library.AdaMuon([{**g, "use_muon": True} for g in groups], betas=setup.betas)
    )
