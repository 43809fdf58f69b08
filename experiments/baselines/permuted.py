"""The control of the ablation: Adam-mini with the same block sizes, but random elements in each block.

If a partition trains well only because of its number of scalars, this control trains equally well. Its blocks are not
runs along an axis, so it gathers and scatters by element. It is too slow for any other use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.stepping import Stepping
from optimizer import AdamMini, Rules, partition


class PermutedAdamMini(Stepping):
    """Adam-mini's update with the block ids of ``rules`` shuffled over the elements of each tensor.

    Args:
        model: the model; the parameter groups are those of ``AdamMini(model)``.
        lr: learning rate.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, for weights of two and more dimensions.
        rules: rule set that determines the block sizes.
        seed: seed of the shuffles; None does not shuffle, which tests use.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rules: str | Rules = "adam_mini",
        seed: int | None = 0,
    ) -> None:
        groups = AdamMini(model, lr, betas, eps, weight_decay, rules=rules).param_groups
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        layouts = partition(model, rules)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._ids: list[list[Tensor]] = []
        for group in self.param_groups:
            self._ids.append([])
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                ids = layouts[name].block_ids(parameter.shape).flatten()
                if generator is not None:
                    ids = ids[torch.randperm(len(ids), generator=generator)]
                self._ids[-1].append(ids)

    def update_all(self) -> None:
        """Update all parameters that have a gradient."""
        for group, group_ids in zip(self.param_groups, self._ids, strict=True):
            for parameter, ids in zip(group["params"], group_ids, strict=True):
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, ids, group)

    def _update(self, parameter: Tensor, grad: Tensor, ids: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2), lr = state["step"].item(), group["betas"], group["lr"]
        second = self.second_moments(state, grad.flatten().square(), ids, 1 - beta2)
        parameter.mul_(1 - lr * group["weight_decay"])
        state["exp_avg"].lerp_(grad, 1 - beta1)
        denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        scale = (-lr / (1 - beta1**step)) / denominator
        parameter.addcmul_(state["exp_avg"], scale[ids].view_as(parameter))

    def second_moments(self, state: dict[str, Tensor], squares: Tensor, ids: Tensor, weight: float) -> Tensor:
        """Update the second moments of one tensor.

        Args:
            state: the tensor's state; changed.
            squares: squared gradients, [n].
            ids: block of each element, int64 [n].
            weight: 1 - beta2.

        Returns:
            The second moment of each block, [number of blocks], before the correction of its bias; not to be changed.
        """
        sizes = torch.bincount(ids)
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros(len(sizes), dtype=squares.dtype)
        sums = torch.bincount(ids, weights=squares, minlength=len(sizes)).to(squares.dtype)
        return state["exp_avg_sq"].lerp_(sums / sizes, weight)

    @property
    def n_scalars(self) -> int:
        """Number of second-moment scalars."""
        return sum(int(ids.max()) + 1 for group in self._ids for ids in group)
