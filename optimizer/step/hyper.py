"""What is the same for every tensor of a group during one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """The numbers of one step of one group.

    Attributes:
        lr: learning rate; a 0-dim tensor where the caller's is one.
        beta1: decay of the first moment; likewise.
        beta2: decay of the second moment; likewise.
        eps: added outside the root.
        weight_decay: decoupled weight decay.
        maximize: ascend instead.
        grad_scale: what gradients were multiplied by (torch.amp.GradScaler with a fused optimizer), or None.
        found_inf: nonzero if any gradient was not finite and the step must not happen (likewise), or None.
    """

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float | Tensor
    maximize: bool
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def of(cls, group: Mapping[str, Any], grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Hyper:
        """From a parameter group; one-element tensors become 0-dim, numbers of other libraries floats."""
        values = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        lr, beta1, beta2, eps, decay = (_scalar(x) for x in values)
        return cls(lr, beta1, beta2, eps, decay, group["maximize"], grad_scale, found_inf)

    def skips(self) -> bool:
        """Whether a GradScaler found that this step must not happen; waits for the device of ``found_inf``."""
        return self.found_inf is not None and bool(self.found_inf)

    def numbers(self) -> dict[str, Any]:
        """Keyword arguments of an update that takes plain numbers; waits for the device of a tensor."""
        return {
            "lr": float(self.lr), "beta1": float(self.beta1), "beta2": float(self.beta2), "eps": float(self.eps),
            "weight_decay": float(self.weight_decay), "maximize": self.maximize,
        }  # fmt: skip


def corrections(lr: float | Tensor, beta1: float | Tensor, beta2: float | Tensor, t: float | Tensor) -> tuple[Any, Any]:
    """The numbers of a step that bias correction changes: (lr / (1 - beta1^t), sqrt(1 - beta2^t)).

    Args:
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        t: steps taken, this one included; a float64 tensor where it must not be read (in fp32 1 - 0.999 is 6e-5 off).
    """
    root = 1 - beta2**t
    return lr / (1 - beta1**t), root.sqrt() if isinstance(root, Tensor) else math.sqrt(root)


def _scalar(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.reshape(()) if value.dim() else value
    # A number of NumPy keeps its precision in arithmetic: 1 - beta2 would be rounded to 11 bits for a float16.
    return value if isinstance(value, float | int) else float(value)
