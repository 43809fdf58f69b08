"""The usual ways to group a model's parameters, used to name the parameters of state dicts without names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..partition import Role, discover
from ..partition.names import clean
from . import matching


def with_names(document: Mapping[str, Any], model: nn.Module, held: Collection[str]) -> Mapping[str, Any]:
    """Add names to a state dict without names, if exactly one of the usual groupings fits it.

    For example, ``AdamW(model.parameters())`` makes one group in the model's order, with or without frozen parameters.

    Args:
        document: the state dict, not changed.
        model: the model it belongs to.
        held: names of the running optimizer's parameters, without wrappers' prefixes.

    Returns:
        The document with ``param_names`` and without frozen parameters that have no state. The document itself if it
        already has names, or if several groupings or none fit.
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
        members = [
            (key, name)
            for key, (name, _) in zip(group["params"], pairs, strict=True)
            if name in held or document["state"].get(key)
        ]
        named.append({**group, "params": [key for key, _ in members], "param_names": [name for _, name in members]})
    return {**document, "param_groups": named}


def usual(model: nn.Module, count: int, *, frozen: bool = False) -> Iterator[list[list[tuple[str, nn.Parameter]]]]:
    """Yield the usual groupings of a model's parameters into ``count`` groups.

    One group has all trainable parameters. Two groups separate the parameters that decay from those that do not: by
    role, by number of dimensions, or as transformers does.

    Args:
        model: the model.
        count: number of groups.
        frozen: whether to yield also one group with all parameters, frozen ones included.

    Yields:
        For each group, its (name, parameter) pairs.
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
    exempt_roles = (Role.NORM, Role.BIAS)
    for decays in (
        [anatomies[name].decays for name, _ in trainable],
        [p.dim() >= 2 for _, p in trainable],
        [anatomies[name].role not in exempt_roles and not name.endswith("bias") for name, _ in trainable],
    ):
        halves = [
            [pair for pair, decay in zip(trainable, decays, strict=True) if decay is side] for side in (True, False)
        ]
        yield from (halves, halves[::-1])


def fits(groups: Sequence[Sequence[tuple[str, nn.Parameter]]], document: Mapping[str, Any]) -> bool:
    """Return whether groups have the sizes of the document's groups, and their parameters the shapes of its moments."""
    saved = [group["params"] for group in document["param_groups"]]
    if [len(group) for group in groups] != [len(keys) for keys in saved]:
        return False
    for group, keys in zip(groups, saved, strict=True):
        for (_, parameter), key in zip(group, keys, strict=True):
            moment = document["state"].get(key, {}).get("exp_avg")
            if moment is not None and tuple(moment.shape) != tuple(parameter.shape):
                return False
    return True
