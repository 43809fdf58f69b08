"""One optimizer made of several: each has its groups, all share one state, one learning rate and one state dict."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.stepping import Stepping

from .rival import Group

State = dict[str, Any]


class Exact(Stepping):
    """An optimizer whose state is loaded in the dtype in which it was saved.

    ``torch.optim.Optimizer`` casts state to the dtype of the parameter, which loses integers and doubles the bytes of
    bfloat16. A subclass may store state in another form, by ``packed`` and ``unpacked``.
    """

    def packed(self, state: State) -> State:
        """Return what is saved of one parameter's state: tensors and numbers only."""
        return state

    def unpacked(self, saved: State, parameter: Tensor, group: Group) -> State:
        """Return the state of a parameter from what ``packed`` returned. The tensors may be kept."""
        return saved

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, with the packed state of each parameter."""
        document = super().state_dict()
        packed = {key: self.packed(dict(state)) for key, state in document["state"].items()}
        return {**document, "state": packed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        super().load_state_dict({**state_dict, "state": {}})
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    state = {name: _copied(value, parameter) for name, value in state_dict["state"][key].items()}
                    self.state[parameter] = self.unpacked(state, parameter, group)


def _copied(value: Any, parameter: Tensor) -> Any:
    """Return a copy of a saved value; tensors that hold more than a counter go to the parameter's device."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.dim() == 0 else value.detach().clone().to(parameter.device)
    return copy.deepcopy(value)


class Parts(Exact):
    """Several optimizers that step one model, each with groups of its own.

    The groups' ``lr`` is the run's learning rate for all parts. A part steps with ``lr`` times its ``rate_scale``.

    Args:
        parts: for each optimizer its groups and a function that makes it from them; a part without groups is left out.
        lr: learning rate.
        scales: for each part, its ``rate_scale``; None for 1.
        tensor_rate: whether the parts need the learning rate as a float32 tensor.
    """

    def __init__(
        self,
        parts: Sequence[tuple[list[Group], Callable[[list[Group]], torch.optim.Optimizer]]],
        lr: float,
        *,
        scales: Sequence[float] | None = None,
        tensor_rate: bool = False,
    ) -> None:
        self._inner: list[tuple[torch.optim.Optimizer, slice]] = []
        self._tensor_rate = tensor_rate
        groups: list[Group] = []
        for (part, make), scale in zip(parts, scales or [1.0] * len(parts), strict=True):
            if part:
                inner = make([dict(group) for group in part])
                self._inner.append((inner, slice(len(groups), len(groups) + len(inner.param_groups))))
                groups += [{**group, "lr": lr, "rate_scale": scale} for group in inner.param_groups]
        super().__init__(groups, {"lr": lr})

    def update_all(self) -> None:
        """Step every part."""
        for inner, place in self._inner:
            # Loading a state dict replaces state and groups, so the parts are given them at every step.
            groups = self.param_groups[place]
            inner.state, inner.param_groups = self.state, groups
            rates = [group["lr"] for group in groups]
            for group, rate in zip(groups, rates, strict=True):
                scaled = rate * group["rate_scale"]
                group["lr"] = torch.tensor(scaled, dtype=torch.float32) if self._tensor_rate else scaled
            try:
                inner.step()
            finally:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate


def adamw(betas: tuple[float, float]) -> Callable[[list[Group]], torch.optim.Optimizer]:
    """Return a function that makes torch's AdamW, for the parameters that a rival's method leaves to it."""
    return lambda groups: torch.optim.AdamW(groups, betas=betas)
