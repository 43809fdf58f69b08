"""Matching of a checkpoint's parameters to the running optimizer's, and the options that its groups load."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..partition.discover import tagged_name
from ..partition.factored import FactoredLayout
from ..partition.layout import AnyLayout, Layout
from ..partition.names import clean
from ..step.labels import label, named
from ..step.options import validate
from .saved import is_published

logger = logging.getLogger("optimizer")

ENGINE = ("exp_avg_dtype", "bf16_rounding", "fused", "foreach", "capturable", "differentiable")
"""Options that decide how state is stored and steps are computed. The running optimizer keeps its own."""
_NOT_OPTIONS = {"params", "param_names", "rules", *ENGINE}
_OF_OTHERS = {"amsgrad", "decoupled_weight_decay"}  # options of Adam and AdamW without meaning for this optimizer
_OF_PUBLISHED = {"name", "beta1", "beta2", "head_numel", "neuron_numel"}
_SHOWN = 3  # names listed in an error message
_ELSEWHERE = {
    "dampening": "torch.optim.SGD",
    "nesterov": "torch.optim.SGD",
    "ns_steps": "torch.optim.Muon",
    "momentum_decay": "torch.optim.NAdam",
    "centered": "torch.optim.RMSprop",
    "rho": "torch.optim.Adadelta",
    "initial_accumulator_value": "torch.optim.Adagrad",
    "lambd": "torch.optim.ASGD",
    "etas": "torch.optim.Rprop",
    "history_size": "torch.optim.LBFGS",
    "beta2_decay": "torch.optim.Adafactor",
    "decay_rate": "Adafactor",
}
"""Options that only one kind of optimizer has. They identify a checkpoint whose parameters have no state."""


@dataclass(frozen=True)
class Slot:
    """A parameter of the running optimizer.

    Attributes:
        where: description of the parameter for error messages.
        name: its name without wrappers' prefixes; empty if unknown.
        parameter: the tensor.
        layout: its layout.
        group: its group.
        g: position of its group.
    """

    where: str
    name: str
    parameter: Tensor
    layout: AnyLayout
    group: Mapping[str, Any]
    g: int

    @property
    def blocks(self) -> Layout | None:
        """The layout if it has blocks and describes the tensor as it is; None for factored and flattened tensors."""
        fits = isinstance(self.layout, Layout) and self.layout.fits(self.parameter.shape)
        return self.layout if fits and isinstance(self.layout, Layout) else None

    @property
    def factored(self) -> FactoredLayout | None:
        """The layout if it is factored and describes the tensor as it is; None for every other layout."""
        fits = isinstance(self.layout, FactoredLayout) and self.layout.fits(self.parameter.shape)
        return self.layout if fits and isinstance(self.layout, FactoredLayout) else None

    @property
    def columns(self) -> tuple[int, ...] | None:
        """Shape of the column means; None if the layout is not factored or does not fit the tensor."""
        shape = tuple(self.parameter.shape)
        return self.layout.columns_shape(shape) if self.layout.fits(shape) else None

    @property
    def aligned(self) -> tuple[int, ...] | None:
        """Shape of the second moment; None if the layout does not fit the tensor."""
        shape = tuple(self.parameter.shape)
        return self.layout.aligned_shape(shape) if self.layout.fits(shape) else None


@dataclass(frozen=True)
class Source:
    """A parameter of a state dict: the key of its state, and the position of its group."""

    key: Any
    g: int


def slots_of(param_groups: Sequence[Mapping[str, Any]], layouts: Sequence[Sequence[AnyLayout]]) -> list[Slot]:
    """Return the parameters of an optimizer as slots, in its order."""
    slots = []
    for g, (group, row) in enumerate(zip(param_groups, layouts, strict=True)):
        for i, ((parameter, name), layout) in enumerate(zip(named(group), row, strict=True)):
            clean_name = clean(name or tagged_name(parameter))
            slots.append(Slot(label(group, g, i), clean_name, parameter, layout, group, g))
    return slots


def matched(
    param_groups: Sequence[Mapping[str, Any]], slots: Sequence[Slot], document: Mapping[str, Any]
) -> list[Source]:
    """Return the saved parameter of each slot.

    Parameters are matched by name if both sides have names, otherwise by position, as torch does.

    Args:
        param_groups: groups of the running optimizer.
        slots: its parameters.
        document: the state dict.

    Raises:
        ValueError: the document is no state dict of an optimizer, or has other names, or other numbers of groups or
            parameters.
    """
    if not isinstance(document.get("state"), Mapping) or not isinstance(document.get("param_groups"), Sequence):
        raise ValueError(
            f"not the state dict of an optimizer: it has {sorted(map(str, document))}, not 'state' and 'param_groups'; "
            "pass what optimizer.state_dict() returned"
        )
    _require_adam(document["param_groups"])
    sources = [Source(key, g) for g, group in enumerate(document["param_groups"]) for key in group["params"]]
    published = written_by_published(document)
    names, names_saved = [slot.name for slot in slots], saved_names(document)
    if published:  # the published package stores names in lower case
        names, names_saved = [name.lower() for name in names], [name.lower() for name in names_saved]
    if _identify(names) and _identify(names_saved):
        by_keys = all(isinstance(source.key, str) for source in sources)
        renamed = not by_keys and not set(names) & set(names_saved)  # no name in common: the model was renamed
        if renamed:
            logger.info("no parameter has the name it has in the checkpoint; they are matched by position")
        elif set(names) == set(names_saved) or not by_keys:  # keys that are names are already in the optimizer's order
            _require_same_names(names, names_saved)
            by_name = dict(zip(names_saved, sources, strict=True))
            return [by_name[name] for name in names]
    if not published:
        _require_same_sizes(param_groups, document["param_groups"])
    elif len(sources) != len(slots):
        raise ValueError(
            f"the checkpoint has {len(sources)} parameters, the optimizer {len(slots)} without names; build it from "
            "the model or model.named_parameters() to match them by name"
        )
    return sources


def _require_adam(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for groups of an optimizer whose options do not mean what Adam's mean.

    Most such optimizers are recognised by their state. SGD without momentum has no state, and without this check its
    lr, 0.1 for example, would replace one of 3e-4.
    """
    for g, group in enumerate(groups):
        hints = sorted({_ELSEWHERE[key] for key in group if key in _ELSEWHERE})
        has_betas = "betas" in group or {"beta1", "beta2"} <= group.keys()
        if ("lr" in group and not has_betas) or "momentum_decay" in group:
            options = sorted(map(str, group.keys() - {"params", "param_names"}))
            raise ValueError(
                f"group {g} of the checkpoint has {options}{'' if has_betas else ', no betas'}: it looks like a state "
                f"of {' or '.join(hints) or 'another kind of optimizer'}; only those of AdamMini, Adam, AdamW and the "
                "adam-mini package can be loaded, so start the optimizer without state"
            )


def written_by_published(document: Mapping[str, Any]) -> bool:
    """Return whether the published adam-mini package wrote the document."""
    return any(isinstance(state, Mapping) and is_published(state) for state in document["state"].values()) or any(
        "beta1" in group and "name" in group for group in document["param_groups"]
    )


def saved_names(document: Mapping[str, Any]) -> list[str]:
    """Return the names of a document's parameters without wrappers' prefixes, in order; empty strings if unknown."""
    names: list[str] = []
    for group in document["param_groups"]:
        keys = group["params"]
        group_names = group.get("param_names")
        if keys and all(isinstance(key, str) for key in keys):
            group_names = keys  # certain, whereas param_names may belong to another grouping
        elif "name" in group and "beta1" in group and len(keys) == 1:
            group_names = [group["name"]]
        usable = isinstance(group_names, Sequence) and len(group_names) == len(keys)
        names += group_names if usable else [""] * len(keys)
    return [clean(str(name)) for name in names]


def rules_named(document: Mapping[str, Any]) -> str | None:
    """Return the name of the rules under which a document's second moments were saved; None if it has no such name."""
    return next((str(group["rules"]) for group in document["param_groups"] if group.get("rules")), None)


def _identify(names: Sequence[str]) -> bool:
    """Return whether names are complete and unique."""
    return all(names) and len(set(names)) == len(names)


def _require_same_names(names: Sequence[str], names_saved: Sequence[str]) -> None:
    """Raise ValueError unless the optimizer's parameters and the checkpoint's have the same names."""
    missing = [name for name in names if name not in set(names_saved)]
    extra = [name for name in names_saved if name not in set(names)]
    if missing or extra:
        differences = []
        if missing:
            differences.append(f"lacks {len(missing)} of this optimizer's parameters ({_few(missing)})")
        if extra:
            differences.append(f"has {len(extra)} that this optimizer does not have ({_few(extra)})")
        raise ValueError(
            f"the checkpoint {' and '.join(differences)}. Give both the same parameters; or, where they were only "
            "renamed, take param_names out of the checkpoint's groups to match by position"
        )


def _few(names: Sequence[str]) -> str:
    """Return the first names as text, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _require_same_sizes(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless groups have the same sizes, which torch requires for matching by position."""
    advice = "build both optimizers from named parameters to match by name"
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, the optimizer "
            f"{len(groups)}; {advice}"
        )
    for g, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {g} has {len(saved['params'])} parameters, the optimizer's {len(group['params'])}; {advice}"
            )


def options_of(
    param_groups: Sequence[Mapping[str, Any]],
    slots: Sequence[Slot],
    sources: Sequence[Source],
    document: Mapping[str, Any],
    exempt: Container[str] = (),
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the groups to load, and the options on which saved groups disagree.

    A group loads each option on which all saved groups of its parameters agree. It keeps its own option if they
    disagree or have none. A checkpoint with one group per weight decay therefore loads into a single group, and the
    other way round. If the running optimizer divides a saved group into parameters that decay and parameters that do
    not, the latter keep their weight decay of 0.

    Args:
        param_groups: groups of the running optimizer.
        slots: its parameters.
        sources: the saved parameter of each slot.
        document: the state dict.
        exempt: names of parameters that do not decay, even if their group in the checkpoint decays.

    Returns:
        The options of each group, with ``params`` numbered over all groups, and a note for each disagreement.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: options exclude each other.
    """
    groups, disagreements, start = [], [], 0
    published = written_by_published(document)
    saved = [_options(group, published) for group in document["param_groups"]]
    for g, group in enumerate(param_groups):
        count = len(group["params"])
        origins = sorted({source.g for slot, source in zip(slots, sources, strict=True) if slot.g == g})
        if not count and len(saved) == len(param_groups):
            origins = [g]
        agreed, differing = _agreed([saved[s] for s in origins])
        if agreed.get("weight_decay") and _keeps_no_decay(g, param_groups, slots, sources, exempt):
            disagreements.append(
                f"group {g} keeps its weight_decay of 0: its saved group, of {agreed.pop('weight_decay')}, did not "
                "separate norms and biases from weights"
            )
        options = {key: value for key, value in group.items() if key not in {"params", *agreed}}
        options |= {key: _like(group.get(key), value) for key, value in agreed.items()}
        if "param_names" not in group and len(origins) == 1:
            source_group = document["param_groups"][origins[0]]
            names = source_group.get("param_names") if len(source_group["params"]) == count else None
            options |= {"param_names": names} if names else {}
        validate(options, f"group {g} of the checkpoint has an argument that cannot be:")
        groups.append({"params": list(range(start, start + count)), **options})
        start += count
        if kept := [key for key in differing if key in group]:
            disagreements.append(f"group {g} keeps its own {', '.join(kept)}: its saved groups {origins} disagree")
    return groups, disagreements


def _keeps_no_decay(
    g: int,
    param_groups: Sequence[Mapping[str, Any]],
    slots: Sequence[Slot],
    sources: Sequence[Source],
    exempt: Container[str],
) -> bool:
    """Return whether a group has no decay while other parameters of its saved groups decay in the running optimizer."""
    weight_decay = param_groups[g].get("weight_decay")
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        return False
    origins = {source.g for slot, source in zip(slots, sources, strict=True) if slot.g == g}
    siblings = {slot.g for slot, source in zip(slots, sources, strict=True) if source.g in origins} - {g}
    all_exempt = all(slot.name in exempt for slot in slots if slot.g == g)
    return bool(siblings) and (all_exempt or any(param_groups[k].get("weight_decay") for k in siblings))


def _options(group: Mapping[str, Any], published: bool) -> dict[str, Any]:
    """Return the options of a saved group that this optimizer loads, under the names that it uses."""
    ignored = _NOT_OPTIONS | _OF_OTHERS | (_OF_PUBLISHED if published else set())
    options = {key: value for key, value in group.items() if key not in ignored}
    if published and {"beta1", "beta2"} <= group.keys():
        options["betas"] = (group["beta1"], group["beta2"])
    return options


def _agreed(saved: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Return the options that all groups have with the same value, and the names of all other options."""
    if not saved:
        return {}, []
    first, rest = saved[0], saved[1:]
    agreed = {key: value for key, value in first.items() if all(key in o and _same(o[key], value) for o in rest)}
    return agreed, sorted({key for options in saved for key in options} - agreed.keys())


def _same(a: Any, b: Any) -> bool:
    """Return whether two option values are equal; tensors must have equal values."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)


def _like(current: Any, value: Any) -> Any:
    """Return a saved number as a tensor if the running optimizer has one, because compiled steps depend on its type."""
    if isinstance(current, Tensor) and not isinstance(value, Tensor) and isinstance(value, (int, float)):
        return torch.full_like(current, value)
    return value
