"""Loading of state dicts of this optimizer, Adam, AdamW and the published adam-mini package.

Parameters are matched by name if both sides have names. The checkpoint decides hyper-parameters (lr, betas, eps,
weight_decay, maximize), steps and moments. The running optimizer decides rules, dtypes, and how a step is computed.
Everything is checked before anything changes, and every tensor is copied.
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
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..partition import Rules, TensorLayout
from ..partition.layout import AnyLayout
from ..partition.rules import shipped
from ..step.dtypes import second_moment_dtype
from . import first_moments as moment
from .blocks import LEVEL, axes_of, is_level, looks_coarser, spreads
from .factored import converted_second_moment
from .matching import Slot, matched, options_of, rules_named, slots_of, written_by_published
from .saved import Saved, Shapes, read
from .specification import step_counter

logger = logging.getLogger("optimizer")
RENAMED = {"derived": "derived_blocks"}
"""Name of a shipped set that once denoted other rules -> today's name of those rules."""


@dataclass
class Prepared:
    """A checkpoint prepared for the running optimizer. It shares nothing with the caller's document.

    Attributes:
        groups: options of every group; ``params`` are consecutive numbers over all groups.
        state: state by parameter in the optimizer's order, and the checkpoint's entries that belong to no parameter.
        notes: each kind of change made, and for how many parameters.
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
    packed: Mapping[int, Shapes] = MappingProxyType({}),
    named: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda document: document,
) -> Iterator[None]:
    """Open a context in which ``Optimizer.load_state_dict`` loads the result of ``prepare``.

    All hooks run as torch runs them. The document is prepared after the caller's last pre-hook, so that changes of the
    pre-hooks count. The state is set before the caller's first post-hook.

    Args:
        optimizer: the optimizer whose ``load_state_dict`` is called in the context.
        layouts: layouts of its parameters, by group.
        rules: its rules.
        convert: rebuild second moments of another partition from block means instead of refusing them.
        exempt: names of parameters that do not decay, even if their group in the checkpoint decays.
        packed: shapes of the quantised first moments of flat parameters, by the parameter's ``id``.
        named: adds names to a document without names, if they are certain; otherwise returns the document unchanged.
    """
    results: list[Prepared] = []

    def check(_: torch.optim.Optimizer, document: dict[str, Any]) -> dict[str, Any]:
        options: Any = {"convert": convert, "exempt": exempt, "packed": packed}
        results.append(prepare(optimizer.param_groups, layouts, rules, named(document), **options))
        return {"state": {}, "param_groups": results[-1].groups}

    def fill(_: torch.optim.Optimizer) -> None:
        optimizer.state.update(results[-1].state)
        if notes := results[-1].notes:
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
    """Open a context in which ``Optimizer.state_dict`` adds the name of the rules to every group of the document.

    The name is there before the caller's hooks run. It is not stored in the optimizer's own groups, where it could
    disagree with the optimizer's rules.
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
    packed: Mapping[int, Shapes] = MappingProxyType({}),
) -> Prepared:
    """Check and copy everything that loading a document will set.

    Args:
        param_groups: groups of the running optimizer; not changed.
        layouts: layouts of its parameters, by group.
        rules: its rules.
        document: a state dict; not changed. Its parameters may have numbers as keys or, as in distributed checkpoints,
            names.
        convert: rebuild second moments of another partition from block means instead of refusing them.
        exempt: names of parameters that do not decay, even if their group in the checkpoint decays.
        packed: shapes of the quantised first moments of flat parameters, by the parameter's ``id``.

    Raises:
        ValueError: the document is no state dict of an optimizer, its parameters do not match, it is the state of
            another kind of optimizer, or it belongs to another partition and ``convert`` is not set.
    """
    prepared, states = checked(param_groups, layouts, rules, document, convert=convert, exempt=exempt, packed=packed)
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
    packed: Mapping[int, Shapes] = MappingProxyType({}),
) -> tuple[Prepared, Iterator[tuple[Slot, dict[str, Any]]]]:
    """Check a document as ``prepare`` does, but copy the states one at a time, as the caller iterates over them.

    Args:
        param_groups: groups of the running optimizer; not changed.
        layouts: layouts of its parameters, by group.
        rules: its rules.
        document: a state dict, with numbers or names as keys; not changed.
        convert: rebuild second moments of another partition from block means instead of refusing them.
        exempt: names of parameters that do not decay, even if their group in the checkpoint decays.
        packed: shapes of the quantised first moments of flat parameters, by the parameter's ``id``.

    Returns:
        The prepared checkpoint without states, and an iterator over (slot, state) for each parameter with state.

    Raises:
        ValueError: the document is no state dict of an optimizer, its parameters do not match, it is the state of
            another kind of optimizer, or it belongs to another partition and ``convert`` is not set.
    """
    slots = slots_of(param_groups, layouts)
    sources = matched(param_groups, slots, document)
    states = document["state"]
    saved = [
        (slot, read(states[source.key], slot.parameter.shape, slot.where, packed.get(id(slot.parameter))))
        for slot, source in zip(slots, sources, strict=True)
        if states.get(source.key)
    ]
    for slot, saved_state in saved:
        _require_same_sharding(slot, saved_state)
    groups, disagreements = options_of(param_groups, slots, sources, document, exempt)
    prepared = Prepared(groups, notes=Counter(disagreements))
    other_blocks = _of_another_partition(saved, rules, document, convert=convert)
    saved_groups = document["param_groups"]
    if any(group.get("weight_decay") and group.get("decoupled_weight_decay") is False for group in saved_groups):
        logger.warning(
            "the checkpoint is Adam's, which adds weight_decay to the gradient; AdamMini decays weights as AdamW does "
            "(decoupled): set weight_decay anew"
        )
    return prepared, (
        (slot, _state(slot, saved_state, id(slot.parameter) in other_blocks, prepared.notes, seed))
        for seed, (slot, saved_state) in enumerate(saved)
    )


def _of_another_partition(
    saved: Iterable[tuple[Slot, Saved]], rules: Rules, document: Mapping[str, Any], *, convert: bool
) -> set[int]:
    """Return the ``id`` of each parameter whose second moment was saved for other blocks.

    Raises:
        ValueError: there are such parameters and ``convert`` is not set. The message names both partitions.
    """
    named = rules_named(document)
    other_rules = named is not None and not same_rules(named, rules)
    offences = [(slot, offence) for slot, state in saved if (offence := offence_of(slot, state, other_rules))]
    if offences and not convert:
        saved_under, advice = f"rules {named!r}", "with the rules of the checkpoint"
        if written_by_published(document):
            saved_under, advice = "the published adam-mini package", "with rules of the same blocks"
        elif named is None:
            saved_under = "rules it does not name (Adam, AdamW, or an older version)"
        elif same_rules(named, rules):
            saved_under += ", but its parameters had other roles"
            advice = "from the model, as the optimizer of the checkpoint was"
            if named in RENAMED:
                saved_under = f"rules {named!r}, perhaps before these rules were renamed to {RENAMED[named]!r}"
                advice = f"with rules={RENAMED[named]!r} (or, if the checkpoint is newer, {advice})"
        (slot, offence), more = offences[0], len(offences) - 1
        raise ValueError(
            f"the checkpoint was saved under {saved_under}, this optimizer has rules {identity(rules)!r}: "
            f"exp_avg_sq of {slot.where} {offence}{f' (and {more} more parameters do not fit)' if more else ''}. Build "
            f"the optimizer {advice}, or pass convert=True to rebuild the second moments from block means"
        )
    return {id(slot.parameter) for slot, _ in offences}


def _require_same_sharding(slot: Slot, saved: Saved) -> None:
    """Raise ValueError if only one of parameter and state is sharded."""
    if hasattr(slot.parameter, "to_local") != hasattr(saved.exp_avg, "to_local"):
        parameter, state = ("sharded", "whole") if hasattr(slot.parameter, "to_local") else ("whole", "sharded")
        raise ValueError(
            f"{slot.where} is {parameter}, but its state in the checkpoint is {state}; load it with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which distributes or gathers it"
        )


def identity(rules: Rules) -> str:
    """Return the name of rules in checkpoints.

    It is the name of a shipped set. Other rules have their name and a digest of their units and overrides.
    """
    if rules.name in shipped() and Rules(rules.name) == rules:
        return rules.name
    fields = rules.to_dict()
    content = json.dumps([sorted(fields["units"].items()), [list(o.values()) for o in fields["overrides"]]])
    return f"{rules.name}#{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def same_rules(named: str, rules: Rules) -> bool:
    """Return whether a name of rules in a checkpoint denotes these rules."""
    if named == identity(rules) or (named in shipped() and Rules(named) == rules):
        return True
    if named.rpartition("#")[2] == identity(rules).rpartition("#")[2] and "#" in named:
        return True  # the same blocks under another name
    # Older checkpoints have no digest. A bare name does not cover overrides, and a shipped name means the shipped set.
    return named == rules.name and named not in shipped() and not rules.overrides


def offence_of(slot: Slot, saved: Saved, other_rules: bool) -> str | None:
    """Describe why a saved second moment does not fit the parameter's layout.

    Args:
        slot: the parameter.
        saved: its state in the checkpoint.
        other_rules: whether the checkpoint names rules other than the optimizer's.

    Returns:
        A phrase that continues "exp_avg_sq of <parameter>"; None if the second moment fits.
    """
    shape, v = tuple(slot.parameter.shape), saved.exp_avg_sq
    aligned = slot.aligned
    if aligned is None:
        return None
    columns = None if saved.columns is None else tuple(saved.columns.shape)
    if columns != slot.columns:
        now = "is not factored" if slot.columns is None else f"needs column means of shape {slot.columns}"
        then = "has no column means" if columns is None else f"has column means of shape {columns}"
        return f"{then} in the checkpoint, but here it {now}"
    layout = slot.blocks
    if layout is not None and (saved.axes is not None or saved.blocks.startswith("vmean")):
        if saved.axes == axes_of(layout, shape):
            return None
        return f"was kept as {saved.blocks} in the checkpoint, but {layout.n_blocks} blocks of {aligned} are needed"
    if tuple(v.shape) != aligned:
        return f"has shape {tuple(v.shape)} in the checkpoint, but {aligned} is needed"
    if slot.factored is not None:
        return None  # any row and column means of these shapes are those of some second moment
    if layout is None or hasattr(v, "to_local"):
        # Comparing the values of a sharded tensor would need communication.
        return "was kept under other rules; it is sharded, so its values are not compared" if other_rules else None
    if v.is_meta:
        return None
    if not is_level(v, layout, LEVEL):
        return f"has the right shape {aligned}, but differs inside one of the {layout.n_blocks} blocks"
    if other_rules and looks_coarser(v, layout):
        return f"has the right shape {aligned}, but was kept for blocks larger than the layout's {layout.n_blocks}"
    return None


def _state(slot: Slot, saved: Saved, other_blocks: bool, notes: Counter[str], seed: int) -> dict[str, Any]:
    """Return the state of one parameter as the running optimizer stores it.

    Args:
        slot: the parameter.
        saved: its state in the checkpoint.
        other_blocks: whether the second moment was saved for other blocks and must be rebuilt.
        notes: counts each kind of change; added to.
        seed: seed of the parameter's stochastic rounding.
    """
    parameter, group = slot.parameter, slot.group
    state: dict[str, Any] = {"step": step_counter(parameter, group, saved.step)}
    state.update(moment.restored(saved, parameter, group["exp_avg_dtype"], notes, seed))
    state.update(_second_moment(slot, saved, other_blocks, notes))
    if group["bf16_rounding"] == "kahan" and parameter.dtype == torch.bfloat16:
        state["compensation"] = _compensation(saved, parameter, notes)
    elif saved.compensation is not None:
        notes["compensation dropped: bf16_rounding is not 'kahan' here"] += 1
    for key in saved.dropped:
        notes[f"{key} dropped: it has no meaning here"] += 1
    state.update(copy.deepcopy(dict(saved.others)))
    return state


def _second_moment(slot: Slot, saved: Saved, other_blocks: bool, notes: Counter[str]) -> dict[str, Tensor]:
    """Return ``exp_avg_sq``, and ``exp_avg_sq_col`` under a factored layout, as the running optimizer stores them."""
    parameter, v, columns = slot.parameter, saved.exp_avg_sq, saved.columns
    dtype = second_moment_dtype(parameter)
    if other_blocks or slot.aligned not in (None, tuple(v.shape)):
        if other_blocks:
            notes["exp_avg_sq rebuilt from block means"] += 1
        new = converted_second_moment(saved, _whole_layout(slot, v), tuple(parameter.shape), dtype, slot.where)
        return {name: tensor.to(parameter.device) for name, tensor in new.items()}
    if v.dtype != dtype:
        notes[f"exp_avg_sq cast from {v.dtype} to {dtype}"] += 1
    pairs = (("exp_avg_sq", v), ("exp_avg_sq_col", columns))
    return {
        name: tensor.detach().to(parameter.device, dtype, copy=True).contiguous()
        for name, tensor in pairs
        if tensor is not None
    }


def _compensation(saved: Saved, parameter: Tensor, notes: Counter[str]) -> Tensor:
    """Return a copy of the saved Kahan compensation, or zeros if the checkpoint has none."""
    zeros = torch.zeros_like(parameter, dtype=torch.bfloat16, memory_format=torch.preserve_format)
    if saved.compensation is None:
        notes["compensation starts at zero: the checkpoint has none"] += 1
        return zeros
    return zeros.copy_(saved.compensation)


def _whole_layout(slot: Slot, v: Tensor) -> TensorLayout:
    """Return the layout for which to rebuild a second moment.

    Raises:
        ValueError: the tensor is sharded, or the second moment fits no partition of the parameter.
    """
    shape, layout = tuple(slot.parameter.shape), slot.factored or slot.blocks
    if layout is None or hasattr(v, "to_local") or hasattr(slot.parameter, "to_local"):
        raise ValueError(
            f"exp_avg_sq of {slot.where} is sharded, but rebuilding it needs the whole tensor; convert the "
            "checkpoint once, on one process: python -m optimizer convert"
        )
    if not spreads(v.shape, shape):
        raise ValueError(
            f"exp_avg_sq of {slot.where} has shape {tuple(v.shape)} in the checkpoint, which no partition of a "
            f"parameter of shape {shape} has; is it a checkpoint of another model?"
        )
    return layout
