"""Rivals with AdamW's moments in few bits, from torchao, which ``make peers`` installs outside the import path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .installed import torchao
from .parts import Parts, State
from .rival import Group, Setup


class LowBit(Parts):
    """AdamW of torchao, without its compilation, and with its state saved as plain tensors.

    torchao compiles the step of each shape of parameter, which takes minutes on a CPU in every new process, more than a
    short run. Here the same functions run eagerly. It refuses a learning rate that is a number, which a training loop
    sets, so each step gets it as a tensor. Tensors of fewer than 4096 values, or whose number of values is no multiple
    of a block (256 in 8 bits, 128 in 4), keep float32 moments; norms and biases always do.

    Codes and scales of a quantized moment are saved as tensors of their own, because its tensor subclass has neither
    ``clone`` nor ``zeros_like``, with which a checkpoint that is written in the background copies tensors.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step; return the closure's loss, if there is a closure."""
        with torch.compiler.set_stance("force_eager"):
            return super().step(closure)

    def packed(self, state: State) -> State:
        """Replace each quantized moment by its codes and scales."""
        packed: State = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and hasattr(value, "codes"):
                packed |= {f"{key}.codes": value.codes, f"{key}.scale": value.scale}
            else:
                packed[key] = value
        return packed

    def unpacked(self, saved: State, parameter: Tensor, group: Group) -> State:
        """Make the quantized moments from what ``packed`` returned."""
        state = {key: value for key, value in saved.items() if "." not in key}
        for key in {key.partition(".")[0] for key in saved if "." in key}:
            codes, scale = saved[f"{key}.codes"], saved[f"{key}.scale"]
            state[key] = self.quantized(parameter, codes, scale, signed=key == "exp_avg")
        return state

    def quantized(self, parameter: Tensor, codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
        """Return a quantized moment of a parameter's shape with the given codes and scales."""
        # 4-bit codes are packed by two into a flat buffer; 8-bit codes have the parameter's shape.
        block = codes.numel() // scale.numel()
        if codes.shape == parameter.shape:
            kind = torchao("optim.subclass_8bit").OptimState8bit
        else:
            kind, block = torchao("optim.subclass_4bit").OptimState4bit, 2 * block
        moment = kind.zeros(parameter.shape, signed, block, parameter.device, dtype=parameter.dtype)
        moment.codes.copy_(codes)
        moment.scale.copy_(scale)
        return moment


def _low_bit(setup: Setup, name: str) -> LowBit:
    make = getattr(torchao("optim"), name)
    return LowBit([(setup.groups, lambda groups: make(groups, betas=setup.betas))], setup.lr, tensor_rate=True)


def adamw8bit(setup: Setup) -> torch.optim.Optimizer:
    """Make torchao's AdamW8bit."""
    return _low_bit(setup, "AdamW8bit")


def adamw4bit(setup: Setup) -> torch.optim.Optimizer:
    """Make torchao's AdamW4bit."""
    return _low_bit(setup, "AdamW4bit")
