"""What an optimizer learns from the model it is built from: parameter groups, and names for saved state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..interface import wrappers
from ..partition import discover
from ..partition.discover import module_behind
from ..partition.names import clean
from ..state.grouping import with_names


@dataclass(frozen=True)
class Source:
    """What the ``params`` argument of an optimizer consists of.

    Attributes:
        model: the model behind the parameters; None if there is none or it cannot be determined.
        groups: the parameters or groups for ``torch.optim.Optimizer``.
        undecayed: names of the parameters without weight decay, if ``params`` is a model; otherwise empty.
    """

    model: nn.Module | None
    groups: Iterable[Any]
    undecayed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, params: nn.Module | Iterable[Any]) -> Source:
        """Find the model behind ``params``, and split the parameters of a model into two groups.

        The registered wrappers first describe the parameters that their libraries flattened. Generators are not
        consumed.

        Args:
            params: a model, ``model.parameters()``, ``model.named_parameters()``, or anything else that
                ``torch.optim.Optimizer`` accepts.

        Raises:
            ValueError: a model has no trainable parameters, or its configuration contradicts its weights.
        """
        model = params if isinstance(params, nn.Module) else module_behind(params)
        if model is not None:
            for wrapper in wrappers():
                wrapper.describe_model(model, discover)
        if not isinstance(params, nn.Module):
            return cls(model, params)
        groups = groups_of(params)
        names = frozenset(clean(name) for group in groups if "weight_decay" in group for name, _ in group["params"])
        return cls(model, groups, names)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into two groups: with weight decay, and without.

    Norms and biases do not decay. The groups contain (name, parameter) pairs; an empty group is left out.

    Raises:
        ValueError: the model has no trainable parameters.
    """
    anatomies = discover(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameters; unfreeze some before building the optimizer")
    # Parameters that FSDP flattened have no anatomy. They join the decaying group; their layout contains the ranges
    # that do not decay.
    decays = {name: name not in anatomies or anatomies[name].decays for name, _ in trainable}
    decaying = {"params": [(name, p) for name, p in trainable if decays[name]]}
    rest = {"params": [(name, p) for name, p in trainable if not decays[name]], "weight_decay": 0.0}
    return [group for group in (decaying, rest) if group["params"]]


def with_model_names(
    document: Mapping[str, Any], model: nn.Module | None, groups: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Add the model's parameter names to a state dict that has no names and is grouped differently.

    With names, saved parameters can be matched with those of an optimizer whose groups have other sizes.

    Args:
        document: the state dict, which is not changed.
        model: the model that the running optimizer was built from; None if it is not available.
        groups: ``param_groups`` of the running optimizer.

    Returns:
        A copy with ``param_names`` in every group. The document itself if its groups have the same sizes as
        ``groups``, if the model or the names of the running parameters are missing, or if the saved grouping is
        ambiguous.
    """
    names = {clean(name) for group in groups for name in group.get("param_names") or ()}
    if model is None or not names:
        return document
    with suppress(KeyError, TypeError, ValueError):  # an invalid state dict is refused later, with a message
        sizes = [len(group["params"]) for group in document["param_groups"]]
        if sizes != [len(group["params"]) for group in groups]:
            return with_names(document, model, names)
    return document
