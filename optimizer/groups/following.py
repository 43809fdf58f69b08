"""What became of the parameters of an optimizer's groups since it last looked.

``param_groups`` belong to the caller, who may append to them, take from them, reorder them and put other tensors in.
A layout has to stay with its parameter through all that. Nothing here refers to a parameter, weakly or strongly:
torch refuses to swap tensors that have weak references, and a strong one would keep a replaced model alive.
"""

from __future__ import annotations

import itertools
import logging
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..interface import Position, whole_shape
from ..partition.layout import AnyLayout
from ..sharding.facts import facts_of
from ..step.options import validate

logger = logging.getLogger("optimizer")

_STAMP = "_adam_mini_serial"
_PROCESS, _NUMBERS = uuid.uuid4().hex, itertools.count()
_LOOKS = 64
"""Frozen parameters looked at in one step."""


class Arrangement:
    """Which parameter was where, without a reference to any.

    A parameter is known by its ``id`` and by a serial number stamped on it. An ``id`` alone is no proof: where FSDP2
    replaces parameters one by one, the next one often gets the ``id`` of the last one freed. The stamp alone is none
    either: ``torch.utils.swap_tensors`` keeps the ``id`` and takes the stamp away.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._ids = [list(map(id, group["params"])) for group in groups]
        self._serials = [list(map(_serial, group["params"])) for group in groups]
        self._names = [list(group.get("param_names") or ()) for group in groups]
        self._dims = [[len(whole_shape(p)) for p in group["params"]] for group in groups]

    def holds(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every group has the same parameters as then, in the same order."""
        if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
            return False
        return [list(map(id, group["params"])) for group in groups] == self._ids

    def holds_at(self, groups: Sequence[Mapping[str, Any]], g: int, i: int) -> bool:
        """Whether one parameter is where it was."""
        return g < len(self._ids) and i < len(self._ids[g]) and self._ids[g][i] == id(groups[g]["params"][i])

    def finder(self) -> Callable[[Tensor], Position | None]:
        """Where a parameter was that somebody has kept alive ever since; None for another one."""
        by_serial = self._by_serial()
        by_id = {n: (g, i) for g, own in enumerate(self._ids) for i, n in enumerate(own)}
        return lambda parameter: by_serial.get(getattr(parameter, _STAMP, ""), by_id.get(id(parameter)))

    def _by_serial(self) -> dict[str, Position]:
        return {serial: (g, i) for g, own in enumerate(self._serials) for i, serial in enumerate(own)}

    def positions(self, groups: Sequence[Mapping[str, Any]]) -> list[list[Position | None]]:
        """Where each parameter of the groups was; None for one that is new, or cannot be told from a new one."""
        by_serial = self._by_serial()

        def was(parameter: Tensor, g: int, i: int) -> Position | None:
            position = by_serial.get(getattr(parameter, _STAMP, ""))
            return (g, i) if position is None and self.holds_at(groups, g, i) else position

        return [[was(p, g, i) for i, p in enumerate(group["params"])] for g, group in enumerate(groups)]

    def edit(
        self,
        groups: Sequence[Mapping[str, Any]],
        layouts: Sequence[Sequence[AnyLayout]],
        found: Callable[[Tensor], str],
    ) -> Edit:
        """What was done to the groups.

        Args:
            groups: as they are now.
            layouts: as they were then.
            found: the name of a parameter of the model or with a tag; empty for one that nobody knows.
        """
        fresh: list[tuple[Tensor, str]] = []
        positions, names = [], []
        for g, (group, was) in enumerate(zip(groups, self.positions(groups), strict=True)):
            known = [found(p) if position is None else "" for p, position in zip(group["params"], was, strict=True)]
            own = self._names_of(group, g, was, known)
            row = []
            for i, (parameter, position) in enumerate(zip(group["params"], was, strict=True)):
                if position is None and not known[i] and self._stands_in(parameter, group, g, i, layouts):
                    position = (g, i)
                if position is None:
                    position = len(layouts), len(fresh)
                    fresh.append((parameter, own[i] if own else ""))
                row.append(position)
            positions.append(row)
            names.append([name or f"unnamed.{g}.{i}" for i, name in enumerate(own)] if own else None)
        return Edit(positions, fresh, names)

    def _stands_in(
        self, parameter: Tensor, group: Mapping[str, Any], g: int, i: int, layouts: Sequence[Sequence[AnyLayout]]
    ) -> bool:
        """Whether a new parameter was put in the place of another one of the same form, as FSDP2 does.

        Or a flat piece of it, as other libraries do: its state can be saved and loaded, a step refuses it by name.
        """
        if g >= len(self._ids) or len(group["params"]) != len(self._ids[g]) or facts_of(parameter) is not None:
            return False
        shape = whole_shape(parameter)
        return layouts[g][i].fits(shape) or (len(shape) == 1 and self._dims[g][i] > 1)

    def _names_of(
        self, group: Mapping[str, Any], g: int, was: Sequence[Position | None], known: Sequence[str]
    ) -> list[str]:
        """The names of a group's parameters as they lie now, empty where there is none; none for a group without.

        Names that the caller changed together with the parameters are the caller's. Others follow their parameters.
        """
        given = list(group.get("param_names") or ())
        before = self._names[g] if g < len(self._names) else []
        in_place = len(given) == len(group["params"])
        if not given or (in_place and given != before):
            return given
        names = []
        for i, position in enumerate(was):
            if position is None:
                names.append(known[i] or (before[i] if in_place else ""))
            else:
                names.append(self._names[position[0]][position[1]] if self._names[position[0]] else "")
        return names


@dataclass(frozen=True)
class Edit:
    """What became of the parameters of all groups.

    Attributes:
        positions: for each parameter, where it was; behind the last group that there was, its index among
            the new ones.
        fresh: the new ones, with their names.
        names: by group, None where it has none.
    """

    positions: list[list[Position]]
    fresh: list[tuple[Tensor, str]]
    names: list[list[str] | None]


def _serial(parameter: Tensor) -> str:
    """A number that no other parameter has, in no process: a copy that was saved and loaded brings its own along."""
    if not hasattr(parameter, _STAMP):
        setattr(parameter, _STAMP, f"{_PROCESS}:{next(_NUMBERS)}")
    return str(getattr(parameter, _STAMP))


def require_groups(groups: Sequence[Any], defaults: Mapping[str, Any]) -> None:
    """Check groups that did not come through ``add_param_group``, and give them the options they lack.

    Raises:
        TypeError: a group or one of its parameters is something else.
        ValueError: an option out of range, or a parameter that is there twice.
    """
    seen: dict[int, str] = {}
    for g, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise TypeError(
                f"param_groups[{g}] is {_short(group)}, not a dict with a list of tensors as 'params'; use "
                "optimizer.add_param_group({'params': [...]})"
            )
        for i, parameter in enumerate(group["params"]):
            if not isinstance(parameter, Tensor):
                raise TypeError(
                    f"param_groups[{g}]['params'][{i}] is {_short(parameter)}, not a tensor; append the parameter "
                    "itself, or give add_param_group pairs of name and parameter"
                )
            where = f"param_groups[{g}]['params'][{i}]"
            if id(parameter) in seen:
                raise ValueError(
                    f"{where} of shape {tuple(parameter.shape)} is {seen[id(parameter)]}, too, and would be stepped "
                    "twice; take one of them out"
                )
            seen[id(parameter)] = where
        require_initialised(group, g)
        validate({**defaults, **group}, f"param_groups[{g}] has an argument that cannot be:")
    for group in groups:
        for name, value in defaults.items():
            group.setdefault(name, value)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"a {type(value).__name__} ({text[:60]}{'...' if len(text) > 60 else ''})"


def require_initialised(group: Mapping[str, Any], g: int) -> None:
    """Raise ValueError for a lazy parameter, whose shape and so whose blocks nobody knows yet."""
    for i, parameter in enumerate(group["params"]):
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"parameter {i} of group {g} is not initialised (a lazy module's); run one forward pass of the model, "
                "then give it to the optimizer"
            )


class Frozen:
    """A model's frozen parameters that no group holds: who thaws one later has to give it to the optimizer."""

    def __init__(self, model: nn.Module, held: Iterable[Tensor]) -> None:
        known = set(map(id, held))
        self._waiting: deque[tuple[weakref.ref[nn.Module], str, str]] = deque()
        for path, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and not parameter.requires_grad and id(parameter) not in known:
                    known.add(id(parameter))
                    self._waiting.append((weakref.ref(module), leaf, f"{path}.{leaf}" if path else leaf))

    def __len__(self) -> int:
        return len(self._waiting)

    def look(self, groups: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Warn, once, of parameters that were thawed and have a gradient, but are in no group.

        Looks at a few of many in each step, so that its cost has a bound.
        """
        for _ in range(min(len(self._waiting), _LOOKS)):
            module, leaf, _ = self._waiting[0]
            owner = module()
            parameter = None if owner is None else owner._parameters.get(leaf)
            if parameter is not None and parameter.requires_grad and parameter.grad is not None:
                self._warn(groups())
                return
            self._waiting.rotate(-1)

    def _warn(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Name all that are thawed, and those that were given to a group no more."""
        held = {id(p) for group in groups for p in group["params"]}
        thawed, rest = [], deque[tuple[weakref.ref[nn.Module], str, str]]()
        for module, leaf, name in self._waiting:
            owner = module()
            parameter = None if owner is None else owner._parameters.get(leaf)
            if parameter is None or id(parameter) in held:
                continue
            if parameter.requires_grad:
                thawed.append(name)
            else:
                rest.append((module, leaf, name))
        self._waiting = rest
        if thawed:
            self._waiting.clear()
            logger.warning(
                "%d parameters were frozen when the optimizer was built and are trainable now, but are in none of its "
                "groups, so they do not train: %s%s. Give them to optimizer.add_param_group({'params': [(name, "
                "parameter), ...]}), or build the optimizer after unfreezing",
                len(thawed), ", ".join(thawed[:3]), ", ..." if len(thawed) > 3 else "",
            )  # fmt: skip
