"""What a rival is: a record of one optimizer other than Adam-mini, and what its constructor is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from optimizer import AdamMini, Role
from optimizer.partition import discover

Group = dict[str, Any]
_EMBEDDINGS = frozenset({Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING})


@dataclass(frozen=True)
class Setup:
    """What the constructor of a rival is given.

    Attributes:
        groups: parameter groups with ``params``, ``param_names``, ``weight_decay``: those of every other arm, so norms
            and biases do not decay.
        lr: peak learning rate.
        betas: the run's decay rates of the first and second moment.
        weight_decay: the run's decoupled weight decay.
        seed: the run's seed, from which a rival derives its random numbers.
        roles: parameter name -> what it does in the network.
    """

    groups: list[Group]
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    seed: int
    roles: Mapping[str, frozenset[Role]]

    @classmethod
    def of(cls, model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, seed: int) -> Setup:
        """Take the groups and roles of a model."""
        made = AdamMini(model, lr, betas, weight_decay=weight_decay, rules="elementwise").param_groups
        groups = [{key: group[key] for key in ("params", "param_names", "weight_decay")} for group in made]
        roles = {name: frozenset(part.role for part in anatomy.parts) for name, anatomy in discover(model).items()}
        return cls(groups, lr, betas, weight_decay, seed, roles)

    def undecayed(self) -> list[Group]:
        """Return the groups for a rival without weight decay."""
        return [{**group, "weight_decay": 0.0} for group in self.groups]

    def names(self) -> list[str]:
        """Return the names of all parameters, group by group."""
        return [name for group in self.groups for name in group["param_names"]]

    def matrices(self) -> set[str]:
        """Return the names of the parameters of two and more dimensions."""
        return {name for name, p in self._parameters() if p.dim() >= 2}

    def embeddings(self) -> set[str]:
        """Return the names of the tables of tokens and positions."""
        return {name for name in self.names() if self.roles[name] & _EMBEDDINGS}

    def output(self) -> set[str]:
        """Return the name of the output layer's matrix.

        A model whose output layer is tied has the token embedding as its output layer, and a model without either, such
        as a classifier, its last matrix.
        """
        matrices = [name for name in self.names() if name in self.matrices()]
        head = {name for name in matrices if Role.HEAD in self.roles[name]}
        tied = {name for name in matrices if Role.TOKEN_EMBEDDING in self.roles[name]}
        return head or tied or set(matrices[-1:])

    def hidden(self) -> set[str]:
        """Return the names of the matrices between embeddings and output layer, of two dimensions exactly."""
        flat = {name for name, p in self._parameters() if p.dim() == 2}
        return flat - self.embeddings() - self.output()

    def split(self, chosen: Iterable[str]) -> tuple[list[Group], list[Group]]:
        """Split the groups into those of the chosen parameters and those of the rest; empty groups are left out."""
        chosen = set(chosen)
        return _kept(self.groups, lambda name: name in chosen), _kept(self.groups, lambda name: name not in chosen)

    def _parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ((n, p) for group in self.groups for n, p in zip(group["param_names"], group["params"], strict=True))


def _kept(groups: list[Group], keep: Callable[[str], bool]) -> list[Group]:
    """Return the groups with only those parameters whose name is kept."""
    kept = []
    for group in groups:
        pairs = [pair for pair in zip(group["param_names"], group["params"], strict=True) if keep(pair[0])]
        if pairs:
            names, params = zip(*pairs, strict=True)
            kept.append({**group, "params": list(params), "param_names": list(names)})
    return kept


@dataclass(frozen=True)
class Rival:
    """One rival: how it is made, where it is from, and what it takes from a run's config.

    Attributes:
        name: its arm.
        build: function that makes the optimizer.
        library: package and class, or ``here`` if it is written in this package.
        paper: arXiv number or page of its source.
        takes: what it takes of the run's betas and weight decay.
        state: its state values per parameter, in words.
        differs: what is not as in the paper, or as in the library's defaults, and why.
        rates: learning rates for a study, about a factor 3 apart, around the best one of short trials.
        against_adam: how its learning rates relate to Adam's.
        still: names of parameters that one step may leave as they are, in words; empty if it changes every parameter.
    """

    name: str
    build: Callable[[Setup], torch.optim.Optimizer] = field(repr=False)
    library: str
    paper: str
    takes: str
    state: str
    differs: str
    rates: tuple[float, ...]
    against_adam: str
    still: str = ""

    def make(self, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        """Make the optimizer of a model.

        Args:
            model: the model to train.
            settings: ``lr``, ``betas``, ``weight_decay`` and ``seed``, as in ``Setup``.

        Raises:
            ValueError: the model is sharded, or the rival's library is not installed; the message says how to get it.
        """
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError(f"arm={self.name!r} is not tested on sharded tensors; use parallel='ddp'")
        return self.build(Setup.of(model, **settings))
