"""Convert a checkpoint file of Adam, AdamW, adam-mini or of other rules to one of ``AdamMini``, tensor by tensor.

The file is mapped into memory, so that first moments are copied from its pages to the new file and second moments are
read in slices. Everything else in the file (weights, schedules, counters) is copied unchanged.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...adam_mini import AdamMini
from ...partition import Rules, tag
from ...partition.names import clean
from ...state import checkpoint, matching
from ...state.blocks import spreads
from ...state.factored import converted_second_moment
from ...state.grouping import fits, usual
from ...state.saved import Saved, is_published, read
from ...step.dtypes import second_moment_dtype
from .folders import is_folder, mapped_folder

KINDS = ("auto", "adam", "adam-mini", "ours")
_SECOND = ("exp_avg_sq", "exp_avg_sq_col")  # entries of a second moment


@dataclass(frozen=True)
class Report:
    """Summary of a conversion.

    Attributes:
        kind: the optimizer that wrote the state: "adam" (Adam, AdamW), "adam-mini" (the published package) or "ours".
        rules: name of the rules of the new state.
        parameters: number of parameters with state.
        rebuilt: number of parameters whose second moment was rebuilt from block means. The others keep theirs.
        without: trainable parameters of the model that have no state in the file.
        values: number of second-moment values before and after the conversion.
    """

    kind: str
    rules: str
    parameters: int
    rebuilt: int
    without: tuple[str, ...]
    values: tuple[int, int]


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    model: nn.Module,
    rules: str | Rules = "adam_mini",
    *,
    kind: str = "auto",
    key: str | None = None,
) -> Report:
    """Convert the optimizer state in a file.

    Args:
        source: a file of ``torch.save`` that is or contains the state dict of an optimizer, or a folder that
            ``torch.distributed.checkpoint`` wrote with any number of ranks.
        target: the file to write. It is replaced in one step after everything has been written to a temporary file.
        model: the model that the state belongs to; its parameters may be on the meta device. They are tagged with their
            roles, see ``optimizer.tag``.
        rules: rules of the new state: name of a shipped set, path of a rules file, or ``Rules``.
        kind: "adam", "adam-mini" or "ours" to refuse the state of any other optimizer; "auto" to accept all three.
        key: keys that lead to the state in the file, joined by dots; None to search for the state.

    Raises:
        ValueError: the file has an unknown format or contains no optimizer state or several, its parameters cannot be
            matched with the model's, or its state cannot be converted. Nothing has been written in these cases.
        OSError: a file cannot be read or written.
    """
    with tempfile.TemporaryDirectory(dir=Path(target).parent, prefix=f".{Path(target).name}.") as scratch:
        document = mapped_folder(source, Path(scratch)) if is_folder(source) else _mapped(source)
        path = _find(document, key, source)
        state, report = converted(_at(document, path), model, rules, kind=kind)
        _write(_replaced(document, path, state), Path(target))
    return report


def converted(
    document: Mapping[str, Any], model: nn.Module, rules: str | Rules = "adam_mini", *, kind: str = "auto"
) -> tuple[dict[str, Any], Report]:
    """Convert an optimizer's state dict to one of ``AdamMini``.

    Args:
        document: the state dict; it is not changed.
        model: the model that the state belongs to; its parameters may be on the meta device. They are tagged with their
            roles, see ``optimizer.tag``.
        rules: rules of the new state: name of a shipped set, path of a rules file, or ``Rules``.
        kind: "adam", "adam-mini" or "ours" to refuse the state of any other optimizer; "auto" to accept all three.

    Returns:
        (new state dict, report). The new state dict contains the first moments of ``document``, not copies of them.

    Raises:
        ValueError: the document's parameters cannot be matched with the model's, or its state cannot be converted.
    """
    actual_kind = kind_of(document)
    if kind not in ("auto", actual_kind):
        raise ValueError(f"--from {kind}, but the file contains a state of {actual_kind!r}; leave it at auto")
    tag(model)
    groups = _named_groups(document, model)
    optimizer = AdamMini([{"params": pairs} for pairs in groups], rules=rules)
    slots = matching.slots_of(optimizer.param_groups, optimizer.layouts)
    sources = matching.matched(optimizer.param_groups, slots, document)
    options, _ = matching.options_of(optimizer.param_groups, slots, sources, document)
    saved_rules = matching.rules_named(document)
    rules_differ = saved_rules is not None and not checkpoint.same_rules(saved_rules, optimizer.rules)
    states, rebuilds, before, after = {}, 0, 0, 0
    for index, (slot, origin) in enumerate(zip(slots, sources, strict=True)):
        if document["state"].get(origin.key):
            saved = read(document["state"][origin.key], slot.parameter.shape, slot.where)
            states[index], was_rebuilt = _converted_state(slot, saved, rules_differ)
            rebuilds += was_rebuilt
            before += saved.exp_avg_sq.numel() + (0 if saved.columns is None else saved.columns.numel())
            after += sum(states[index][name].numel() for name in _SECOND if name in states[index])
    names = {slot.name for slot in slots}
    without = tuple(n for n, p in model.named_parameters() if p.requires_grad and clean(n) not in names)
    new = {
        "state": states,
        "param_groups": [{**group, "rules": checkpoint.identity(optimizer.rules)} for group in options],
    }
    return new, Report(actual_kind, optimizer.rules.name, len(states), rebuilds, without, (before, after))


def kind_of(document: Mapping[str, Any]) -> str:
    """Return which optimizer wrote the state: "adam", "adam-mini" or "ours"."""
    if any(is_published(state) for state in document["state"].values()):
        return "adam-mini"
    return "ours" if matching.rules_named(document) else "adam"


def _converted_state(slot: matching.Slot, saved: Saved, rules_differ: bool) -> tuple[dict[str, Any], bool]:
    """Return the new state of one parameter, and whether its second moment was rebuilt from block means."""
    shape, v = tuple(slot.parameter.shape), saved.exp_avg_sq
    if not spreads(v.shape, shape):
        raise ValueError(
            f"exp_avg_sq of {slot.where} has shape {tuple(v.shape)} in the file, which no partition of a parameter of "
            f"shape {shape} has; is it a checkpoint of another model?"
        )
    blocks_differ = checkpoint.offence_of(slot, saved, rules_differ) is not None
    second = {"exp_avg_sq": v} if saved.columns is None else {"exp_avg_sq": v, "exp_avg_sq_col": saved.columns}
    if blocks_differ or tuple(v.shape) != slot.aligned:
        layout = slot.factored or slot.blocks
        assert layout is not None  # ``converted`` built the optimizer from whole parameters.
        second = converted_second_moment(saved, layout, shape, second_moment_dtype(slot.parameter), slot.where)
    state = {"step": torch.tensor(saved.step), "exp_avg": saved.exp_avg, **second, **saved.others}
    if saved.scale is not None:
        state["exp_avg_scale"] = saved.scale
    if saved.compensation is not None:
        state["compensation"] = saved.compensation
    return state, blocks_differ


def _named_groups(document: Mapping[str, Any], model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """Return the file's groups as lists of (name, parameter).

    The published package writes one group per parameter. Its groups are joined if they have the same weight decay.

    Raises:
        ValueError: the file has names that the model does not have, or it has no names and its parameters cannot be
            matched with the model's in exactly one way.
    """
    parameters = {clean(name): p for name, p in model.named_parameters()}
    names = matching.saved_names(document)
    if not all(names):
        return _assigned(document, model)
    if matching.written_by_published(document):
        by_lower_name = {name.lower(): name for name in parameters}
        names = [by_lower_name.get(name.lower(), name) for name in names]
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(
            f"the model has no parameter {', '.join(unknown[:3])} ({len(unknown)} of the file's {len(names)} are "
            "unknown); pass the model the checkpoint was made with"
        )
    groups: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    remaining_names = iter(names)
    for g, group in enumerate(document["param_groups"]):
        key = ("decay", group.get("weight_decay")) if matching.written_by_published(document) else g
        group_names = islice(remaining_names, len(group["params"]))
        groups.setdefault(key, []).extend((name, parameters[name]) for name in group_names)
    return list(groups.values())


def _assigned(document: Mapping[str, Any], model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """Name the parameters of a file without names.

    The names are those of the only usual way of grouping the model's parameters whose shapes match the file's.

    Raises:
        ValueError: no usual way of grouping matches, or more than one does.
    """
    fitting: list[list[list[tuple[str, nn.Parameter]]]] = []
    for groups in usual(model, len(document["param_groups"])):
        if fits(groups, document) and groups not in fitting:
            fitting.append(groups)
    if len(fitting) != 1:
        how = "several ways of grouping" if fitting else "none of the usual ways of grouping"
        sizes = [len(group["params"]) for group in document["param_groups"]]
        raise ValueError(
            f"the file has no parameter names, and {how} the model's parameters fit its groups of {sizes}; put the "
            "names in order into each group of the file as 'param_names'"
        )
    return fitting[0]


def _mapped(source: str | os.PathLike[str]) -> Any:
    """Map a file of ``torch.save`` into memory and return its contents."""
    if Path(source).is_dir():
        raise ValueError(
            f"{os.fspath(source)!r} is a folder without .metadata, so torch.distributed.checkpoint did not finish it; "
            "pass a folder that it finished, or a file of torch.save"
        )
    try:
        return torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{os.fspath(source)!r} cannot be mapped ({str(error).splitlines()[0]}); save plain tensors, numbers and "
            "dictionaries with torch.save of torch 1.6 or later"
        ) from error
    except OSError as error:
        if error.filename is not None:
            raise
        # The file was truncated: its table of contents points beyond its end, and the system's error names no file.
        raise ValueError(
            f"{os.fspath(source)!r} is damaged or cut, {Path(source).stat().st_size} bytes long ({error}); copy it "
            "again, or use an earlier checkpoint"
        ) from error


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _find(document: Any, key: str | None, source: Any) -> tuple[Any, ...]:
    """Return the keys that lead to the optimizer's state, which is at the top or up to two levels below it.

    Raises:
        ValueError: there is no optimizer state at ``key``; or ``key`` is None, and there is none or several.
    """
    values: dict[tuple[Any, ...], Any] = {(): document}
    for _ in range(2):
        values |= {
            (*path, k): child for path, value in values.items() if not _is_state(value) for k, child in _children(value)
        }
    paths = [path for path, value in values.items() if _is_state(value)]
    by_key = {".".join(map(str, path)): path for path in paths}
    if key is not None:
        if key not in by_key:
            raise ValueError(f"--key {key!r} is no optimizer state in {os.fspath(source)!r}; found {list(by_key)}")
        return by_key[key]
    if len(paths) != 1:
        listing = (
            f" ({', '.join(by_key)}); choose one with --key" if paths else ": no dictionary has state and param_groups"
        )
        raise ValueError(f"{os.fspath(source)!r} holds {len(paths)} optimizer states{listing}")
    return paths[0]


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _replaced(document: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of the document with a new value at the path. The original is not changed."""
    if not path:
        return new
    if isinstance(document, Mapping):
        return {**document, path[0]: _replaced(document[path[0]], path[1:], new)}
    return [_replaced(value, path[1:], new) if i == path[0] else value for i, value in enumerate(document)]


def _write(document: Any, target: Path) -> None:
    """Write to a temporary file in the target's folder, then replace the target in one step."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        torch.save(document, name)  # Passed a file object, torch would copy each tensor first.
        os.fsync(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # The mode that open() sets; files of mkstemp are private.
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    finally:
        os.close(handle)
