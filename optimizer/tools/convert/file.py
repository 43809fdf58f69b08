"""A checkpoint file of Adam, AdamW, adam-mini or other rules, made into one of ours, a tensor at a time.

The file is mapped, not read: first moments go from its pages to the new file's, second moments are read in pieces. What
else is in the file (weights, schedules, counters) is carried over as it is.
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
from ...state.blocks import rebuilt, spreads
from ...state.grouping import fits, usual
from ...state.saved import Saved, is_published, read
from ...step.dtypes import second_moment_dtype
from .folders import is_folder, mapped_folder

KINDS = ("auto", "adam", "adam-mini", "ours")


@dataclass(frozen=True)
class Report:
    """What was converted.

    Attributes:
        kind: whose state it was: "adam" (Adam, AdamW), "adam-mini" (the published package), "ours".
        rules: the rules the new state follows.
        parameters: how many parameters have state.
        rebuilt: for how many of them the second moment was rebuilt from block means; the others' were kept.
        without: trainable parameters of the model that the file says nothing of.
        values: second-moment values, before and after.
    """

    kind: str
    rules: str
    parameters: int
    rebuilt: int
    without: tuple[str, ...]
    values: tuple[int, int]


def convert_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], model: nn.Module, rules: str | Rules = "adam_mini",
    *, kind: str = "auto", key: str | None = None,
) -> Report:  # fmt: skip
    """Convert the optimizer state in a file.

    Args:
        source: a file of ``torch.save`` with an optimizer's state dict or a dictionary that holds one, or a folder of
            ``torch.distributed.checkpoint``, by whatever number of ranks.
        target: the file to write; replaced at once when all is written, never half.
        model: what the state belongs to; ``meta`` parameters will do. Its parameters are tagged.
        rules: of the new state, as in ``AdamMini``.
        kind: "auto", or whose state it must be: "adam", "adam-mini", "ours".
        key: where the state is in the file, parts joined by dots; None to look for it.

    Raises:
        ValueError: no such file format, no or several optimizer states, parameters that cannot be assigned, or state
            that cannot be converted; nothing has been written then.
        OSError: files that cannot be read or written.
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
    """An optimizer's state dict as one of ours; first moments are the document's own tensors.

    Args:
        document: the state dict, not changed.
        model: as for ``convert_file``.
        rules: as for ``convert_file``.
        kind: as for ``convert_file``.

    Raises:
        ValueError: as for ``convert_file``.
    """
    found = kind_of(document)
    if kind not in ("auto", found):
        raise ValueError(f"--from {kind}, but the file holds a state of {found!r}; leave it at auto")
    tag(model)
    groups = _named_groups(document, model)
    optimizer = AdamMini([{"params": pairs} for pairs in groups], rules=rules)
    slots = matching.slots_of(optimizer.param_groups, optimizer.layouts)
    sources = matching.matched(optimizer.param_groups, slots, document)
    options, _ = matching.options_of(optimizer.param_groups, slots, sources, document)
    named = matching.rules_named(document)
    others = named is not None and not checkpoint.same_rules(named, optimizer.rules)
    states, rebuilds, before, after = {}, 0, 0, 0
    for index, (slot, origin) in enumerate(zip(slots, sources, strict=True)):
        if document["state"].get(origin.key):
            saved = read(document["state"][origin.key], slot.parameter.shape, slot.where)
            states[index], changed = _state(slot, saved, others)
            rebuilds += changed
            before, after = before + saved.exp_avg_sq.numel(), after + states[index]["exp_avg_sq"].numel()
    names = {slot.name for slot in slots}
    without = tuple(n for n, p in model.named_parameters() if p.requires_grad and clean(n) not in names)
    new = {
        "state": states,
        "param_groups": [{**group, "rules": checkpoint.identity(optimizer.rules)} for group in options],
    }
    return new, Report(found, optimizer.rules.name, len(states), rebuilds, without, (before, after))


def kind_of(document: Mapping[str, Any]) -> str:
    """Whose state it is: "adam", "adam-mini" or "ours"."""
    if any(is_published(state) for state in document["state"].values()):
        return "adam-mini"
    return "ours" if matching.rules_named(document) else "adam"


def _state(slot: matching.Slot, saved: Saved, others: bool) -> tuple[dict[str, Any], bool]:
    """The new state of one parameter, and whether its second moment had to be rebuilt."""
    shape, v = tuple(slot.parameter.shape), saved.exp_avg_sq
    if not spreads(v.shape, shape):
        raise ValueError(
            f"exp_avg_sq of {slot.where} has shape {tuple(v.shape)} in the file, which no partition of a parameter of "
            f"shape {shape} has; is it a checkpoint of another model?"
        )
    other_blocks = checkpoint.offence_of(slot, saved, others) is not None
    if other_blocks or tuple(v.shape) != slot.aligned:
        assert slot.blocks is not None  # the optimizer was built from whole parameters above
        v = rebuilt(v, slot.blocks, shape, second_moment_dtype(slot.parameter))
    state = {"step": torch.tensor(saved.step), "exp_avg": saved.exp_avg, "exp_avg_sq": v, **saved.others}
    if saved.scale is not None:
        state["exp_avg_scale"] = saved.scale
    if saved.compensation is not None:
        state["compensation"] = saved.compensation
    return state, other_blocks


def _named_groups(document: Mapping[str, Any], model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """The file's groups as (name, parameter) pairs; those of the published package joined where their decay agrees.

    Raises:
        ValueError: names the model does not have, or no names and no sure way to assign the parameters.
    """
    parameters = {clean(name): p for name, p in model.named_parameters()}
    names = matching.saved_names(document)
    if not all(names):
        return _assigned(document, model)
    if matching.written_by_published(document):
        lower = {name.lower(): name for name in parameters}
        names = [lower.get(name.lower(), name) for name in names]
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(
            f"the model has no parameter {', '.join(unknown[:3])} ({len(unknown)} of the file's {len(names)} are "
            "unknown); pass the model the checkpoint was made with"
        )
    groups: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    rest = iter(names)
    for g, group in enumerate(document["param_groups"]):
        which = ("decay", group.get("weight_decay")) if matching.written_by_published(document) else g
        groups.setdefault(which, []).extend((n, parameters[n]) for n in islice(rest, len(group["params"])))
    return list(groups.values())


def _assigned(document: Mapping[str, Any], model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """Names for a file without any: the usual ways to make groups, the one whose shapes are the file's."""
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
    """The file's contents, tensors still in the file."""
    if Path(source).is_dir():
        raise ValueError(
            f"{os.fspath(source)!r} is a folder without .metadata, so torch.distributed.checkpoint did not finish it; "
            "give a folder that it finished, or a file of torch.save"
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
        # A file that was cut: its own table of contents points beyond its end, and the system names no file.
        raise ValueError(
            f"{os.fspath(source)!r} is damaged or cut, {Path(source).stat().st_size} bytes long ({error}); copy it "
            "again, or take an earlier checkpoint"
        ) from error


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)


def _find(document: Any, key: str | None, source: Any) -> tuple[Any, ...]:
    """Where the optimizer's state is: at the top, or up to two levels down."""
    slots: dict[tuple[Any, ...], Any] = {(): document}
    for _ in range(2):
        slots |= {(*path, k): child for path, value in slots.items() if not _is_state(value)
                   for k, child in _children(value)}  # fmt: skip
    found = [path for path, value in slots.items() if _is_state(value)]
    shown = {".".join(map(str, path)): path for path in found}
    if key is not None:
        if key not in shown:
            raise ValueError(f"--key {key!r} is no optimizer state in {os.fspath(source)!r}; found {list(shown)}")
        return shown[key]
    if len(found) != 1:
        listing = (
            f" ({', '.join(shown)}); choose one with --key" if found else ": no dictionary has state and param_groups"
        )
        raise ValueError(f"{os.fspath(source)!r} holds {len(found)} optimizer states{listing}")
    return found[0]


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def _replaced(document: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The document with another value at the path; the original is not changed."""
    if not path:
        return new
    if isinstance(document, Mapping):
        return {**document, path[0]: _replaced(document[path[0]], path[1:], new)}
    return [_replaced(value, path[1:], new) if i == path[0] else value for i, value in enumerate(document)]


def _write(document: Any, target: Path) -> None:
    """Write beside the target, then put it in slot at once."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        torch.save(document, name)  # by its name: a file object would get each tensor as a copy
        os.fsync(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # as open() would have made it; mkstemp's files are private
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    finally:
        os.close(handle)
