"""Training tasks beyond this project's small language models: real data, and models and trainers of kept libraries.

A workload is one file: the config of what it trains, and the task or the loop that the config makes. To add one, write
such a file, a line in ``KINDS`` and one in ``WORKLOADS``. A config is a frozen dataclass with these methods:

    require_consistent()          raises a ValueError if a field is wrong
    fetch(config)                 checks libraries and data, and downloads what is missing; raises if that fails
    task(config, device) -> Task  what ``experiments.train`` runs, or
    loop(config, folder, options, interruption) -> Loop   where a library trains by itself

The libraries are in an environment of their own (``make setup-workloads``) and are imported only when a run needs them.
"""

from __future__ import annotations

from .diffusion import DIFFUSION, DIT, Diffusion
from .graphs import GAT, GCN, NodeClassifier
from .pretraining import GPT2, LLAMA
from .remax import REMAX, ReMax
from .reward import REWARD, RewardModel
from .rloo import RLOO, LeaveOneOut
from .sft import SFT, SFT_LORA, FineTuning
from .vision import RESNET, RESNET_BATCHNORM, VIT, Classifier
from .workload import Workload

KINDS: tuple[type, ...] = (FineTuning, RewardModel, ReMax, LeaveOneOut, Classifier, NodeClassifier, Diffusion)
"""The configs of what workloads train."""
WORKLOADS: dict[str, Workload] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "sft": SFT,
    "sft_lora": SFT_LORA,
    "reward": REWARD,
    "remax": REMAX,
    "rloo": RLOO,
    "resnet": RESNET,
    "resnet_batchnorm": RESNET_BATCHNORM,
    "vit": VIT,
    "gcn": GCN,
    "gat": GAT,
    "diffusion": DIFFUSION,
    "dit": DIT,
}

__all__ = ["KINDS", "WORKLOADS", "Workload"]
