"""Which saved parameter belongs to which of the running optimizer's, and which options a group takes over."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..partition.discover import tagged_name
from ..partition.layout import AnyLayout, Layout
from ..partition.names import clean
from ..step.labels import label, named
from ..step.options import validate
from .saved import is_published

logger = logging.getLogger("optimizer")

ENGINE = ("exp_avg_dtype", "bf16_rounding", "fused", "foreach", "capturable", "differentiable")
"""Options that say how state is kept and steps are computed: the running optimizer's business."""
_NOT_OPTIONS = {"params", "param_names", "rules", *ENGINE}
_OF_OTHERS = {"amsgrad", "decoupled_weight_decay"}  # AdamW's and Adam's; no meaning here
_OF_PUBLISHED = {"name", "beta1", "beta2", "head_numel", "neuron_numel"}
_SHOWN = 3
_ELSEWHERE = {
    "dampening": "torch.optim.SGD", "nesterov": "torch.optim.SGD", "ns_steps": "torch.optim.Muon",
    "momentum_decay": "torch.optim.NAdam", "centered": "torch.optim.RMSprop", "rho": "torch.optim.Adadelta",
    "initial_accumulator_value": "torch.optim.Adagrad", "lambd": "torch.optim.ASGD", "etas": "torch.optim.Rprop",
    "history_size": "torch.optim.LBFGS", "beta2_decay": "torch.optim.Adafactor", "decay_rate": "Adafactor",
}  # fmt: skip
"""Options of one kind of optimizer alone: what tells it where its parameters have no state."""


@dataclass(frozen=True)
class Slot:
    """A parameter of the running optimizer.

    Attributes:
        where: it in words.
        name: its name without wrappers' prefixes, empty where unknown.
        parameter: the tensor.
        layout: its blocks.
        group: the group it is in.
        g: the group's position.
    """

    where: str
    name: str
    parameter: Tensor
    layout: AnyLayout
    group: Mapping[str, Any]
    g: int

    @property
    def blocks(self) -> Layout | None:
        """The layout, where it tells the blocks of what is held here; it does not for ranges of a flattened tensor."""
        known = isinstance(self.layout, Layout) and self.layout.fits(self.parameter.shape)
        return self.layout if known and isinstance(self.layout, Layout) else None

    @property
    def aligned(self) -> tuple[int, ...] | None:
        """Shape of the second moment; None where the layout cannot tell."""
        shape = tuple(self.parameter.shape)
        return self.layout.aligned_shape(shape) if self.layout.fits(shape) else None


@dataclass(frozen=True)
class Source:
    """A parameter of a document: the key of its state, and its group's position."""

    key: Any
    g: int


def slots_of(param_groups: Sequence[Mapping[str, Any]], layouts: Sequence[Sequence[AnyLayout]]) -> list[Slot]:
    """The parameters of an optimizer, in its order."""
    slots = []
    for g, (group, row) in enumerate(zip(param_groups, layouts, strict=True)):
        for i, ((parameter, name), layout) in enumerate(zip(named(group), row, strict=True)):
            known = clean(name or tagged_name(parameter))
            slots.append(Slot(label(group, g, i), known, parameter, layout, group, g))
    return slots


def matched(
    param_groups: Sequence[Mapping[str, Any]], slots: Sequence[Slot], document: Mapping[str, Any]
) -> list[Source]:
    """The saved parameter of each slot: by name where both sides have names, else by position as torch does.

    Raises:
        ValueError: no state dict of an optimizer; names missing or left over; other numbers of groups or parameters.
    """
    if not isinstance(document.get("state"), Mapping) or not isinstance(document.get("param_groups"), Sequence):
        raise ValueError(
            f"not the state dict of an optimizer: it has {sorted(map(str, document))}, not 'state' and 'param_groups'; "
            "pass what optimizer.state_dict() returned"
        )
    _require_adam(document["param_groups"])
    sources = [Source(key, g) for g, group in enumerate(document["param_groups"]) for key in group["params"]]
    published = written_by_published(document)
    own, theirs = [slot.name for slot in slots], saved_names(document)
    if published:  # its names are lower-case
        own, theirs = [name.lower() for name in own], [name.lower() for name in theirs]
    if _identify(own) and _identify(theirs):
        by_keys = all(isinstance(source.key, str) for source in sources)
        renamed = not by_keys and not set(own) & set(theirs)  # nothing in common: the model's names changed
        if renamed:
            logger.info("no parameter has the name it has in the checkpoint; they are matched by position")
        elif set(own) == set(theirs) or not by_keys:  # keys by name are in the optimizer's order already
            _require_same_names(own, theirs)
            found = dict(zip(theirs, sources, strict=True))
            return [found[name] for name in own]
    if not published:
        _require_same_sizes(param_groups, document["param_groups"])
    elif len(sources) != len(slots):
        raise ValueError(
            f"the checkpoint has {len(sources)} parameters, the optimizer {len(slots)} without names; build it from "
            "the model or model.named_parameters() to match them by name"
        )
    return sources


def _require_adam(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for groups of an optimizer whose numbers mean something else than Adam's.

    State tells most of them; SGD without momentum has none, and its lr of 0.1 would replace one of 3e-4.
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
    """Whether the document comes from the published adam-mini package."""
    return any(isinstance(state, Mapping) and is_published(state) for state in document["state"].values()) or any(
        "beta1" in group and "name" in group for group in document["param_groups"]
    )


def saved_names(document: Mapping[str, Any]) -> list[str]:
    """The names of a document's parameters without wrappers' prefixes, in its order; empty strings where unknown."""
    names: list[str] = []
    for group in document["param_groups"]:
        keys = group["params"]
        given = group.get("param_names")
        if keys and all(isinstance(key, str) for key in keys):
            given = keys  # sure, where the list of names may be that of another grouping
        elif "name" in group and "beta1" in group and len(keys) == 1:
            given = [group["name"]]
        names += given if isinstance(given, Sequence) and len(given) == len(keys) else [""] * len(keys)
    return [clean(str(name)) for name in names]


def rules_named(document: Mapping[str, Any]) -> str | None:
    """The rules that a document says its second moments follow; None where it does not say."""
    return next((str(group["rules"]) for group in document["param_groups"] if group.get("rules")), None)


def _identify(names: Sequence[str]) -> bool:
    return all(names) and len(set(names)) == len(names)


def _require_same_names(own: Sequence[str], theirs: Sequence[str]) -> None:
    missing = [name for name in own if name not in set(theirs)]
    extra = [name for name in theirs if name not in set(own)]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of this optimizer's parameters ({_few(missing)})")
        if extra:
            parts.append(f"has {len(extra)} that this optimizer does not have ({_few(extra)})")
        raise ValueError(
            f"the checkpoint {' and '.join(parts)}. Give both the same parameters; or, where they were only renamed, "
            "take param_names out of the checkpoint's groups to match by position"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _require_same_sizes(own: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> None:
    """What torch asks of documents that are matched by position."""
    advice = "build both optimizers from named parameters to match by name"
    if len(own) != len(theirs):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(theirs)}, the optimizer {len(own)}; "
            f"{advice}"
        )
    for g, (group, other) in enumerate(zip(own, theirs, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {g} has {len(other['params'])} parameters, the optimizer's {len(group['params'])}; {advice}"
            )


def options_of(
    param_groups: Sequence[Mapping[str, Any]],
    slots: Sequence[Slot],
    sources: Sequence[Source],
    document: Mapping[str, Any],
    exempt: Container[str] = (),
) -> tuple[list[dict[str, Any]], list[str]]:
    """The groups to load, and what the saved ones disagree on.

    A group takes each option that all saved groups of its parameters agree on, and keeps its own where they do not or
    have none: a checkpoint with one group per decay loads into one group, and the other way round. Where a saved
    group is divided here into what decays and what does not, the latter keeps its weight decay of 0.

    Args:
        param_groups: of the running optimizer.
        slots: its parameters.
        sources: where each of them is in the document.
        document: the state dict.
        exempt: names of parameters that do not decay whatever the other group's weight decay is.

    Raises:
        ValueError: a hyper-parameter out of range.
        RuntimeError: flags that exclude each other.
    """
    groups, disagreements, start = [], [], 0
    published = written_by_published(document)
    saved = [_options(group, published) for group in document["param_groups"]]
    for g, own in enumerate(param_groups):
        count = len(own["params"])
        of = sorted({source.g for slot, source in zip(slots, sources, strict=True) if slot.g == g})
        if not count and len(saved) == len(param_groups):
            of = [g]
        agreed, differing = _agreed([saved[s] for s in of])
        if agreed.get("weight_decay") and _keeps_no_decay(g, param_groups, slots, sources, exempt):
            kept_decay = f"group {g} keeps its weight_decay of 0: its saved group, of {agreed.pop('weight_decay')}, "
            disagreements.append(kept_decay + "did not tell norms and biases from weights")
        options = {key: value for key, value in own.items() if key not in {"params", *agreed}}
        options |= {key: _like(own.get(key), value) for key, value in agreed.items()}
        if "param_names" not in own and len(of) == 1 and len(document["param_groups"][of[0]]["params"]) == count:
            names = document["param_groups"][of[0]].get("param_names")
            options |= {"param_names": names} if names else {}
        validate(options, f"group {g} of the checkpoint has an argument that cannot be:")
        groups.append({"params": list(range(start, start + count)), **options})
        start += count
        if kept := [key for key in differing if key in own]:
            disagreements.append(f"group {g} keeps its own {', '.join(kept)}: its saved groups {of} disagree")
    return groups, disagreements


def _keeps_no_decay(
    g: int,
    param_groups: Sequence[Mapping[str, Any]],
    slots: Sequence[Slot],
    sources: Sequence[Source],
    exempt: Container[str],
) -> bool:
    """Whether a group does not decay here, while other parameters of its saved groups do."""
    own = param_groups[g].get("weight_decay")
    if isinstance(own, Tensor) or own != 0:
        return False
    of = {source.g for slot, source in zip(slots, sources, strict=True) if slot.g == g}
    beside = {slot.g for slot, source in zip(slots, sources, strict=True) if source.g in of} - {g}
    apart = all(slot.name in exempt for slot in slots if slot.g == g)
    return bool(beside) and (apart or any(param_groups[other].get("weight_decay") for other in beside))


def _options(group: Mapping[str, Any], published: bool) -> dict[str, Any]:
    """The options of a saved group that have a meaning here, under their names here."""
    without = _NOT_OPTIONS | _OF_OTHERS | (_OF_PUBLISHED if published else set())
    options = {key: value for key, value in group.items() if key not in without}
    if published and {"beta1", "beta2"} <= group.keys():
        options["betas"] = (group["beta1"], group["beta2"])
    return options


def _agreed(saved: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """(options that every one of the groups has, with one value; the names of the others)."""
    if not saved:
        return {}, []
    first, rest = saved[0], saved[1:]
    agreed = {key: value for key, value in first.items() if all(key in o and _same(o[key], value) for o in rest)}
    return agreed, sorted({key for options in saved for key in options} - agreed.keys())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)


def _like(own: Any, value: Any) -> Any:
    """A saved number as a tensor where the running optimizer has one: compiled steps count on it."""
    if isinstance(own, Tensor) and not isinstance(value, Tensor) and isinstance(value, (int, float)):
        return torch.full_like(own, value)
    return value
