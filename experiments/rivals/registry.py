"""All rivals by name. A new one is a function that makes it, in a file of this package, and a record here."""

from __future__ import annotations

from . import hift, low_bit, low_rank, microadam, muons, plain, scale, zhai
from .rival import Rival

_LIBRARY = "pytorch_optimizer 4.1.0"
_HIDDEN = "hidden matrices; AdamW for embeddings, output layer and vectors"

_ALL = (
    Rival(
        "adafactor", plain.adafactor, "torch.optim.Adafactor", "1804.04235",
        takes="weight decay, decoupled; no betas (no first moment; second: 1 - t^-0.8)",
        state="one per row and column; one per element of vectors",
        differs="eps1 is 1e-18 (torch: 1.2e-7, which is larger than squared gradients; paper: 1e-30)",
        rates=(1e-2, 3e-2, 1e-1), against_adam="ten times, as the RMS of each tensor (0.05 to 0.1) multiplies it",
    ),
    Rival(
        "adafactor_zhai", zhai.adafactor_zhai, "here", "2106.04560",
        takes="beta1 and weight decay, decoupled; second moment: 1 - t^-0.8, at most 0.999",
        state="1 in bfloat16, and one per row and column",
        differs="updates are clipped to an RMS of 1, as in Adafactor's paper (authors' code: not); decay is multiplied "
        "by the rate (authors' code: by the schedule alone)",
        rates=(1e-3, 3e-3, 1e-2), against_adam="the same",
    ),
    Rival(
        "came", plain.came, f"{_LIBRARY} CAME", "2307.02047",
        takes="both betas and weight decay, decoupled; beta3 is 0.9999",
        state="1, and two per row and column",
        differs="beta2 is the run's (paper: 0.999)",
        rates=(1e-4, 3e-4, 1e-3), against_adam="a tenth or less",
    ),
    Rival(
        "sm3", plain.sm3, f"{_LIBRARY} SM3", "1901.11150",
        takes="beta1; no weight decay",
        state="1, and one per row and column",
        differs="nothing known",
        rates=(1e-2, 3e-2, 1e-1), against_adam="ten times, as its steps shrink like one over the root of the step",
    ),
    Rival(
        "lion", plain.lion, f"{_LIBRARY} Lion", "2302.06675",
        takes="ten times the weight decay, decoupled; betas are the paper's (0.9, 0.99)",
        state="1",
        differs="nothing known",
        rates=(3e-4, 1e-3, 3e-3), against_adam="a third",
    ),
    Rival(
        "sgd", plain.sgd, "torch.optim.SGD", "Nesterov 1983",
        takes="beta1 as momentum, with Nesterov's look-ahead; no weight decay",
        state="1",
        differs="momentum is a sum, not an average, so its rate acts ten times",
        rates=(3e-2, 1e-1, 3e-1, 1.0), against_adam="ten to a hundred times; not of the same unit",
    ),
    Rival(
        "muon", muons.muon, "torch.optim.Muon", "2502.16982",
        takes="weight decay, decoupled; momentum is 0.95; both betas for AdamW",
        state="1 for hidden matrices, 2 for the rest",
        differs=f"for {_HIDDEN}, with the same rate",
        rates=(3e-3, 1e-2, 3e-2), against_adam="the same to three times",
    ),
    Rival(
        "normuon", muons.normuon, f"{_LIBRARY} NorMuon", "2510.05491",
        takes="weight decay, decoupled; momentum and beta2 are 0.95; both betas for AdamW",
        state="1 and one per row for hidden matrices, 2 for the rest",
        differs=f"for {_HIDDEN}, with the same rate; scaled as in Algorithm 1, not as the authors' code",
        rates=(3e-3, 1e-2, 3e-2), against_adam="the same to three times",
    ),
    Rival(
        "adamuon", muons.adamuon, f"{_LIBRARY} AdaMuon", "2507.11005",
        takes="both betas and weight decay, decoupled",
        state="2",
        differs=f"for {_HIDDEN}, with the same rate; no sign of the momentum is taken (paper: it is)",
        rates=(3e-3, 1e-2, 3e-2), against_adam="the same to three times",
    ),
    Rival(
        "soap", plain.soap, f"{_LIBRARY} SOAP", "2409.11321",
        takes="both betas and weight decay, decoupled",
        state="2, and 2 (rows^2 + columns^2) per matrix",
        differs="beta1 is the run's 0.9 (paper: 0.95); the eigenbasis is renewed every 10 steps, as in the paper",
        rates=(1e-3, 3e-3, 1e-2), against_adam="the same",
        still="all, at the first step",
    ),
    Rival(
        "galore", low_rank.galore, f"{_LIBRARY} GaLore", "2403.03507",
        takes="both betas and weight decay, decoupled",
        state="32 (rows + 2 columns) per hidden matrix, 2 for the rest",
        differs=f"for {_HIDDEN}, with the same rate; renewed every 50 steps (paper: 200 of far longer runs)",
        rates=(3e-3, 1e-2, 3e-2, 1e-1), against_adam="three to ten times, as hidden matrices move by a quarter of it",
    ),
    Rival(
        "apollo_mini", low_rank.apollo_mini, "here", "2412.05270",
        takes="both betas and weight decay, decoupled",
        state="2 per unit of the longer side of hidden matrices, 2 for the rest",
        differs=f"for {_HIDDEN}, with the same rate",
        rates=(1e-3, 3e-3, 1e-2, 3e-2), against_adam="the same to three times",
    ),
    Rival(
        "scale", scale.scale, "here", "2506.16659",
        takes="beta1 for the output layer, both betas for vectors, weight decay, decoupled",
        state="1 for the output layer, 2 for vectors, none for the rest",
        differs="divides by the RMS of a column, as the authors' code, not by its norm",
        rates=(3e-4, 1e-3, 3e-3, 1e-2), against_adam="half of it",
    ),
    Rival(
        "adamw8bit", low_bit.adamw8bit, "torchao 0.18.0 AdamW8bit", "2110.02861",
        takes="both betas and weight decay, decoupled",
        state="2, in 8 bits for tensors of 4096 and more values",
        differs="nothing known",
        rates=(1e-3, 3e-3, 1e-2), against_adam="the same",
    ),
    Rival(
        "adamw4bit", low_bit.adamw4bit, "torchao 0.18.0 AdamW4bit", "2309.01507",
        takes="both betas and weight decay, decoupled",
        state="2, in 4 bits for tensors of 4096 and more values",
        differs="no factored second moment, which the paper has for some models",
        rates=(1e-3, 3e-3, 1e-2), against_adam="the same",
    ),
    Rival(
        "microadam", microadam.microadam, "here", "2405.15593",
        takes="both betas and weight decay, decoupled",
        state="0.2 (a window of ten gradients of 1 %: value and place), and half a byte of error",
        differs="ranges of errors are float32 (authors' code: bfloat16)",
        rates=(1e-3, 3e-3, 1e-2, 3e-2), against_adam="the same to three times",
        still="entries that were never among the largest",
    ),
    Rival(
        "hift", hift.hift, "here", "2401.15207",
        takes="both betas and weight decay, decoupled",
        state="2, of which one layer's are in use",
        differs="each step has its own rate (paper: one per round); inactive moments stay on the device",
        rates=(3e-3, 1e-2, 3e-2), against_adam="the same to three times, as a layer moves once in six steps",
        still="all but those of one layer",
    ),
)  # fmt: skip

RIVALS = {rival.name: rival for rival in _ALL}
"""Arm -> rival."""
