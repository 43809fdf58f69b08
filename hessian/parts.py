"""Weight matrices and the parts of fused ones, with the forms of sharing that each can have."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from optimizer.partition import Anatomy, Part, Role, Rules, Unit, discover, layout_of

_EMBEDDED = {Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.HEAD}


@dataclass(frozen=True)
class WeightPart:
    """A weight matrix, one part of a fused one, or one of several experts.

    Attributes:
        name: name of the parameter; the role of a part and the number of an expert follow in brackets.
        parameter: name of the parameter.
        role: role of the matrix.
        shape: (output units, inputs of a unit).
        head_dim: number of output units of an attention head; None if there are no heads.
        index: int64 [output units, inputs], where in the flattened parameter its elements are.
    """

    name: str
    parameter: str
    role: Role
    shape: tuple[int, int]
    head_dim: int | None
    index: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part's elements of a tensor of the parameter's shape, [output units, inputs]."""
        return tensor.reshape(-1)[self.index]

    def candidates(self) -> dict[str, Tensor]:
        """Return unit -> block of every element, int64 [n], for every shared unit that the matrix can have."""
        rows = Unit.TOKEN if self.role in _EMBEDDED else Unit.OUT_NEURON
        units = [Unit.TENSOR, rows, Unit.IN_NEURON] + ([Unit.ATTENTION_HEAD] if self.head_dim else [])
        anatomy = Anatomy(self.shape, (Part(self.role, self.shape[0], self.head_dim),), "a weight", in_axis=1)
        return {
            unit.value: layout_of(anatomy, Rules("candidate", {self.role: unit})).block_ids(self.shape).flatten()
            for unit in units
        }


def weight_parts(model: nn.Module) -> list[WeightPart]:
    """Return all weight matrices of a model, with the parts of fused ones and experts separate.

    Norms, biases and tensors of unknown structure with fewer than two axes are left out, and so are frozen parameters.
    """
    out: list[WeightPart] = []
    anatomies = discover(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.requires_grad:
            out += _parts(name, anatomies[name])
    return out


def _parts(name: str, anatomy: Anatomy) -> list[WeightPart]:
    shape, fold, leading = anatomy.shape, anatomy.fold, anatomy.leading
    view = shape if fold == 1 else (fold, shape[0] // fold, *shape[1:])
    experts = prod(view[:leading])
    index = torch.arange(prod(shape)).reshape(view).movedim(anatomy.axis, leading)
    index = index.reshape(experts, view[anatomy.axis], -1)
    period, out = sum(part.size for part in anatomy.parts), []
    for expert in range(experts):
        start = 0
        for part in anatomy.parts:
            rows = torch.arange(start, start + part.size)
            rows = (rows + period * torch.arange(anatomy.repeat)[:, None]).flatten()
            start += part.size
            label = name if len(anatomy.parts) == 1 else f"{name}[{part.role.value}]"
            label += f"[{expert}]" if experts > 1 else ""
            own = index[expert, rows]
            out.append(WeightPart(label, name, part.role, (own.shape[0], own.shape[1]), part.head_dim, own))
    return out
