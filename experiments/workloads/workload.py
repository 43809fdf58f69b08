"""What a workload is: one training task beyond this project's small language models, at a size that two cores train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARMS = ("elementwise", "adam_mini", "derived", "factored")
"""AdamW, the paper's partition, and the two rule sets that the ablations found best."""
CONVOLUTION_ARMS = (*ARMS, "pytorch_default")
"""``adam_mini`` has one scalar per output channel of a convolution; ``pytorch_default`` has one per tensor."""


@dataclass(frozen=True)
class Workload:
    """A workload. Its study has its name: every arm over its rates on seed 0, then its best rate on seeds 1 and 2.

    Attributes:
        run: fields of its ``TrainConfig``; at least ``model`` and ``data``.
        smoke: fields that differ in the profile ``smoke``, whose run takes some seconds.
        rates: learning rates of every arm.
        arms: its arms.
        full: name -> fields that differ from ``run`` at full size; docs/workloads.md gives their sources.
    """

    run: Mapping[str, Any]
    smoke: Mapping[str, Any]
    rates: tuple[float, ...]
    arms: tuple[str, ...] = ARMS
    full: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
