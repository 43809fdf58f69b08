"""The hyper-parameters of one step, which are the same for every tensor of a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """The hyper-parameters of one step of one group.

    Attributes:
        lr: learning rate; a float, or a 0-dim tensor if the caller passed a tensor.
        beta1: decay rate of the first moment, in [0, 1); a float, or a 0-dim tensor if the caller passed a tensor.
        beta2: decay rate of the second moment, in [0, 1); a float, or a 0-dim tensor if the caller passed a tensor.
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: coefficient of the decoupled weight decay.
        maximize: whether to ascend the gradient instead of descending it.
        grad_scale: the factor by which torch.amp.GradScaler multiplied the gradients, one element; None without one.
        found_inf: nonzero if torch.amp.GradScaler found a gradient that is not finite, so that the step must be
            skipped, one element; None without a scaler.
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
        """Read a parameter group; one-element tensors become 0-dim and numbers of other libraries become floats."""
        values = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        lr, beta1, beta2, eps, decay = (_scalar(x) for x in values)
        return cls(lr, beta1, beta2, eps, decay, group["maximize"], grad_scale, found_inf)

    def skips(self) -> bool:
        """Whether a GradScaler found that this step must be skipped; waits for the device of ``found_inf``."""
        return self.found_inf is not None and bool(self.found_inf)

    def numbers(self) -> dict[str, Any]:
        """Return the keyword arguments of an update over plain numbers; waits for the device of each tensor."""
        return {
            "lr": float(self.lr),
            "beta1": float(self.beta1),
            "beta2": float(self.beta2),
            "eps": float(self.eps),
            "weight_decay": float(self.weight_decay),
            "maximize": self.maximize,
        }


def corrections(lr: float | Tensor, beta1: float | Tensor, beta2: float | Tensor, t: float | Tensor) -> tuple[Any, Any]:
    """Compute the bias corrections of step t: (lr / (1 - beta1^t), sqrt(1 - beta2^t)).

    Args:
        lr: learning rate.
        beta1: decay rate of the first moment, in [0, 1).
        beta2: decay rate of the second moment, in [0, 1).
        t: number of steps taken, this one included. If the host must not read it, a tensor, which has to be float64:
            in fp32, 1 - 0.999 has an error of 6e-5.

    Returns:
        Two floats; tensors where an argument that enters them is a tensor.
    """
    root = 1 - beta2**t
    return lr / (1 - beta1**t), root.sqrt() if isinstance(root, Tensor) else math.sqrt(root)


def _scalar(value: Any) -> Any:
    """Return a one-element tensor as a 0-dim tensor and any other number as an int or float."""
    if isinstance(value, Tensor):
        return value.reshape(()) if value.dim() else value
    # NumPy scalars are converted, because they keep their precision in arithmetic: for a float16, 1 - beta2 would be
    # rounded to 11 bits.
    return value if isinstance(value, float | int) else float(value)
