"""Loading states: of this optimizer, Adam, AdamW and the published adam-mini package; by names where there are names.

What a checkpoint decides: hyper-parameters (lr, betas, eps, weight_decay, maximize), steps, moments. What the running
optimizer decides: rules, dtypes, and how a step is computed. Nothing moves before everything has been checked, and no
tensor of the caller's is kept.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..partition import Layout, Rules
from ..partition.layout import AnyLayout
from ..partition.rules import shipped
from ..step.dtypes import second_moment_dtype
from . import first_moments as moment
from .blocks import LEVEL, axes_of, is_level, looks_coarser, rebuilt, spreads
from .matching import Slot, matched, options_of, rules_named, slots_of, written_by_published
from .saved import Saved, read
from .specification import step_counter

logger = logging.getLogger("optimizer")


@dataclass
class Prepared:
    """A checkpoint made ready for the running optimizer; nothing in it is the caller's.

    Attributes:
        groups: options of every group, ``params`` numbered through.
        state: state by parameter, in the optimizer's order, and what the checkpoint has beside parameters.
        notes: what was changed on the way -> for how many parameters.
    """

    groups: list[dict[str, Any]]
    state: dict[Any, Any] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)


@contextmanager
def loading(
    optimizer: torch.optim.Optimizer,
    layouts: Sequence[Sequence[AnyLayout]],
    rules: Rules,
    *,
    convert: bool = False,
    exempt: Container[str] = (),
    named: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda document: document,
) -> Iterator[None]:
    """While this is open, ``Optimizer.load_state_dict`` loads what ``prepare`` makes of the document.

    Torch keeps its part: its hooks run as ever. The document is prepared after the last of the caller's pre-hooks, so
    that it is what they made of it; the state is in slot before the first of the caller's post-hooks.

    Args:
        optimizer: whose ``load_state_dict`` is about to be called.
        layouts: of its parameters, by group.
        rules: its rules.
        convert: rebuild second moments of another partition from block means instead of refusing them.
        exempt: names of parameters that do not decay, whatever the checkpoint's group of them does.
        named: gives a document without names those that can be known for sure.
    """
    found: list[Prepared] = []

    def check(_: torch.optim.Optimizer, document: dict[str, Any]) -> dict[str, Any]:
        found.append(prepare(optimizer.param_groups, layouts, rules, named(document), convert=convert, exempt=exempt))
        return {"state": {}, "param_groups": found[-1].groups}

    def fill(_: torch.optim.Optimizer) -> None:
        optimizer.state.update(found[-1].state)
        if notes := found[-1].notes:
            logger.info("loaded optimizer state: %s", "; ".join(f"{note} ({n}x)" for note, n in notes.items()))

    handles = (
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(fill, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def naming(optimizer: torch.optim.Optimizer, rules: Rules) -> Iterator[None]:
    """While this is open, ``Optimizer.state_dict`` names the rules in every group, for the caller's hooks to see, too.

    Only the document carries the name: it belongs to the optimizer, and a group that keeps it could be wrong.
    """

    def name(_: torch.optim.Optimizer, document: dict[str, Any]) -> None:
        for group in document["param_groups"]:
            group["rules"] = identity(rules)

    handle = optimizer.register_state_dict_post_hook(name, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def prepare(
    param_groups: Sequence[Mapping[str, Any]],
    layouts: Sequence[Sequence[AnyLayout]],
    rules: Rules,
    document: Mapping[str, Any],
    *,
    convert: bool = False,
    exempt: Container[str] = (),
) -> Prepared:
    """Everything that loading a document will set, checked and copied.

    Args:
        param_groups: of the running optimizer; not changed.
        layouts: of its parameters, by group.
        rules: its rules.
        document: as ``state_dict`` gives it; parameters may be keyed by number or, as distributed checkpoints do, by
            name. Not changed.
        convert: rebuild second moments of another partition from block means instead of refusing them.
        exempt: names of parameters that do not decay, whatever the checkpoint's group of them does.

    Raises:
        ValueError: no state dict of an optimizer; parameters that do not match; another optimizer's state; another
            partition's, without ``convert``.
    """
    prepared, states = checked(param_groups, layouts, rules, document, convert=convert, exempt=exempt)
    prepared.state.update({slot.parameter: state for slot, state in states})
    keys = {key for group in document["param_groups"] for key in group["params"]}
    others = {key: value for key, value in document["state"].items() if key not in keys}
    prepared.state.update(copy.deepcopy(others))
    return prepared


def checked(
    param_groups: Sequence[Mapping[str, Any]],
    layouts: Sequence[Sequence[AnyLayout]],
    rules: Rules,
    document: Mapping[str, Any],
    *,
    convert: bool = False,
    exempt: Container[str] = (),
) -> tuple[Prepared, Iterator[tuple[Slot, dict[str, Any]]]]:
    """``prepare`` up to the states, which are made one by one as they are asked for.

    Args and errors: as of ``prepare``.

    Returns:
        what will be set, without states; each parameter that has one and its state.
    """
    slots = slots_of(param_groups, layouts)
    sources = matched(param_groups, slots, document)
    states = document["state"]
    saved = [(slot, read(states[source.key], slot.parameter.shape, slot.where))
             for slot, source in zip(slots, sources, strict=True) if states.get(source.key)]  # fmt: skip
    for slot, one in saved:
        _require_alike(slot, one)
    groups, disagreements = options_of(param_groups, slots, sources, document, exempt)
    prepared = Prepared(groups, notes=Counter(disagreements))
    others = _of_another_partition(saved, rules, document, convert=convert)
    saved_groups = document["param_groups"]
    if any(group.get("weight_decay") and group.get("decoupled_weight_decay") is False for group in saved_groups):
        logger.warning(
            "the checkpoint is Adam's, whose weight_decay went through the moments; here it is decoupled, as AdamW's: "
            "set it anew"
        )
    return prepared, (
        (slot, _state(slot, one, id(slot.parameter) in others, prepared.notes, seed))
        for seed, (slot, one) in enumerate(saved)
    )


def _of_another_partition(
    saved: Iterable[tuple[Slot, Saved]], rules: Rules, document: Mapping[str, Any], *, convert: bool
) -> set[int]:
    """Parameters, by id, whose second moment was kept for other blocks.

    Raises:
        ValueError: there are some and ``convert`` is not set; both partitions named.
    """
    named = rules_named(document)
    others = named is not None and not same_rules(named, rules)
    offences = [(slot, offence) for slot, one in saved if (offence := offence_of(slot, one, others))]
    if offences and not convert:
        saved_under, advice = f"rules {named!r}", "with the rules of the checkpoint"
        if written_by_published(document):
            saved_under, advice = "the published adam-mini package", "with rules of the same blocks"
        elif named is None:
            saved_under = "rules it does not name (Adam, AdamW, or an older version)"
        elif same_rules(named, rules):
            saved_under += ", but knew its parameters otherwise"
            advice = "from the model, as that of the checkpoint was"
        (slot, offence), more = offences[0], len(offences) - 1
        raise ValueError(
            f"the checkpoint was saved under {saved_under}, this optimizer has rules {identity(rules)!r}: "
            f"exp_avg_sq of {slot.where} {offence}{f' ({more} more parameters likewise)' if more else ''}. Build the "
            f"optimizer {advice}, or pass convert=True to rebuild the second moments from block means"
        )
    return {id(slot.parameter) for slot, _ in offences}


def _require_alike(slot: Slot, saved: Saved) -> None:
    """Raise where one of parameter and state is sharded and the other is not."""
    if hasattr(slot.parameter, "to_local") != hasattr(saved.exp_avg, "to_local"):
        one, other = ("sharded", "whole") if hasattr(slot.parameter, "to_local") else ("whole", "sharded")
        raise ValueError(
            f"{slot.where} is {one}, but its state in the checkpoint is {other}; load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which distributes or gathers it"
        )


def identity(rules: Rules) -> str:
    """What a checkpoint calls its rules: the name of a shipped set; others with a digest of units and overrides."""
    if rules.name in shipped() and Rules(rules.name) == rules:
        return rules.name
    said = rules.to_dict()
    content = json.dumps([sorted(said["units"].items()), [list(o.values()) for o in said["overrides"]]])
    return f"{rules.name}#{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def same_rules(named: str, rules: Rules) -> bool:
    """Whether a checkpoint's name of its rules stands for these."""
    if named == identity(rules) or (named in shipped() and Rules(named) == rules):
        return True
    if named.rpartition("#")[2] == identity(rules).rpartition("#")[2] and "#" in named:
        return True  # the same blocks under another name
    # Older checkpoints have the name alone, which does not stand for overrides or for another set that is shipped.
    return named == rules.name and named not in shipped() and not rules.overrides


def offence_of(slot: Slot, saved: Saved, other_rules: bool) -> str | None:
    """What is wrong with a saved second moment under the parameter's layout, in words; None where nothing is."""
    shape, v = tuple(slot.parameter.shape), saved.exp_avg_sq
    wanted = slot.aligned
    if wanted is None:
        return None
    layout = slot.blocks
    if layout is not None and (saved.axes is not None or saved.blocks.startswith("vmean")):
        if saved.axes == axes_of(layout, shape):
            return None
        return f"was kept as {saved.blocks} in the checkpoint, but {layout.n_blocks} blocks of {wanted} are needed"
    if tuple(v.shape) != wanted:
        return f"has shape {tuple(v.shape)} in the checkpoint, but {wanted} is needed"
    if layout is None or hasattr(v, "to_local"):
        # Values of a sharded tensor would need communication.
        return "was kept under other rules, and is sharded, so that values do not tell" if other_rules else None
    if v.is_meta:
        return None
    if not is_level(v, layout, LEVEL):
        return f"has the right shape {wanted}, but differs inside one of the {layout.n_blocks} blocks"
    if other_rules and looks_coarser(v, layout):
        return f"has the right shape {wanted}, but was kept for blocks larger than the {layout.n_blocks} there are"
    return None


def _state(slot: Slot, saved: Saved, other_blocks: bool, notes: Counter[str], seed: int) -> dict[str, Any]:
    """The state of one parameter, as the running optimizer keeps it."""
    parameter, group = slot.parameter, slot.group
    shape, v = tuple(parameter.shape), saved.exp_avg_sq
    dtype = second_moment_dtype(parameter)
    if other_blocks or slot.aligned not in (None, tuple(v.shape)):
        v = rebuilt(v, _whole_layout(slot, v), shape, dtype).to(parameter.device)
        if other_blocks:
            notes["exp_avg_sq rebuilt from block means"] += 1
    else:
        if v.dtype != dtype:
            notes[f"exp_avg_sq cast from {v.dtype} to {dtype}"] += 1
        v = v.detach().to(parameter.device, dtype, copy=True).contiguous()
    state: dict[str, Any] = {"step": step_counter(parameter, group, saved.step)}
    state.update(moment.restored(saved, parameter, group["exp_avg_dtype"], notes, seed))
    state["exp_avg_sq"] = v
    if group["bf16_rounding"] == "kahan" and parameter.dtype == torch.bfloat16:
        state["compensation"] = _compensation(saved, parameter, notes)
    elif saved.compensation is not None:
        notes["compensation dropped: bf16_rounding is not 'kahan' here"] += 1
    for key in saved.dropped:
        notes[f"{key} dropped: it has no meaning here"] += 1
    state.update(copy.deepcopy(dict(saved.others)))
    return state


def _compensation(saved: Saved, parameter: Tensor, notes: Counter[str]) -> Tensor:
    zeros = torch.zeros_like(parameter, dtype=torch.bfloat16, memory_format=torch.preserve_format)
    if saved.compensation is None:
        notes["compensation starts at zero: the checkpoint has none"] += 1
        return zeros
    return zeros.copy_(saved.compensation)


def _whole_layout(slot: Slot, v: Tensor) -> Layout:
    """The blocks to rebuild a second moment for; raises where that cannot be done from what is at hand."""
    shape, layout = tuple(slot.parameter.shape), slot.blocks
    if layout is None or hasattr(v, "to_local") or hasattr(slot.parameter, "to_local"):
        raise ValueError(
            f"exp_avg_sq of {slot.where} is sharded, and rebuilding it would need the whole tensor; convert the "
            "checkpoint once, on one process: python -m optimizer convert"
        )
    if not spreads(v.shape, shape):
        raise ValueError(
            f"exp_avg_sq of {slot.where} has shape {tuple(v.shape)} in the checkpoint, which no partition of a "
            f"parameter of shape {shape} has; is it a checkpoint of another model?"
        )
    return layout
