"""The ways in which the parameters of a model usually come into groups, for documents without names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..partition import Role, discover
from ..partition.names import clean
from . import matching


def with_names(document: Mapping[str, Any], model: nn.Module, held: Collection[str]) -> Mapping[str, Any]:
    """A state dict without names as one with names, where its groups can only be one of the usual ones.

    ``AdamW(model.parameters())`` makes one group in the model's order, with frozen parameters or without.

    Args:
        document: the state dict, not changed.
        model: what it belongs to.
        held: names of the parameters that the running optimizer has, without wrappers' prefixes.

    Returns:
        the document with ``param_names``, without frozen parameters that have no state; as it is where it has names
        already, or several ways of grouping fit, or none.
    """
    if any(matching.saved_names(document)):
        return document
    fitting: list[list[list[tuple[str, nn.Parameter]]]] = []
    for groups in usual(model, len(document["param_groups"]), frozen=True):
        if fits(groups, document) and groups not in fitting:
            fitting.append(groups)
    if len(fitting) != 1:
        return document
    named = []
    for group, pairs in zip(document["param_groups"], fitting[0], strict=True):
        kept = [(key, name) for key, (name, _) in zip(group["params"], pairs, strict=True)
                if name in held or document["state"].get(key)]  # fmt: skip
        named.append({**group, "params": [key for key, _ in kept], "param_names": [name for _, name in kept]})
    return {**document, "param_groups": named}


def usual(model: nn.Module, count: int, *, frozen: bool = False) -> Iterator[list[list[tuple[str, nn.Parameter]]]]:
    """All in one group; or what decays and what does not, by role, by dimension, or as transformers splits them.

    Args:
        model: whose parameters.
        count: of groups.
        frozen: whether one group may also hold all parameters, frozen ones included.
    """
    trainable = [(clean(name), p) for name, p in model.named_parameters() if p.requires_grad]
    if count == 1:
        yield [trainable]
        if frozen:
            yield [[(clean(name), p) for name, p in model.named_parameters()]]
        return
    if count != 2:
        return
    anatomies = {clean(name): anatomy for name, anatomy in discover(model).items()}
    kept = (Role.NORM, Role.BIAS)
    for decays in (
        [anatomies[name].decays for name, _ in trainable],
        [p.dim() >= 2 for _, p in trainable],
        [anatomies[name].role not in kept and not name.endswith("bias") for name, _ in trainable],
    ):
        halves = [
            [pair for pair, here in zip(trainable, decays, strict=True) if here is side] for side in (True, False)
        ]
        yield from (halves, halves[::-1])


def fits(groups: Sequence[Sequence[tuple[str, nn.Parameter]]], document: Mapping[str, Any]) -> bool:
    """Whether groups have the sizes of the document's, and their parameters the shapes of its first moments."""
    saved = [group["params"] for group in document["param_groups"]]
    if [len(group) for group in groups] != [len(keys) for keys in saved]:
        return False
    for group, keys in zip(groups, saved, strict=True):
        for (_, parameter), key in zip(group, keys, strict=True):
            moment = document["state"].get(key, {}).get("exp_avg")
            if moment is not None and tuple(moment.shape) != tuple(parameter.shape):
                return False
    return True
