"""Tracking of parameters while the caller edits ``param_groups``.

The caller may append to the groups, remove, reorder and replace parameters. A layout has to stay with its parameter
through all these edits. This module keeps no reference to a parameter: torch refuses to swap tensors that have weak
references, and a strong reference would keep a replaced model alive.
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
from ..partition.factored import TensorLayout
from ..partition.layout import AnyLayout
from ..sharding.facts import facts_of
from ..step.options import validate

logger = logging.getLogger("optimizer")

_STAMP = "_adam_mini_serial"
_PROCESS, _NUMBERS = uuid.uuid4().hex, itertools.count()
_LOOKS = 64
"""How many frozen parameters are checked in one step."""


class Arrangement:
    """A record of the position of every parameter in the groups, without references to the parameters.

    A parameter is identified by its ``id`` and by a serial number stamped on it. The ``id`` alone is not reliable:
    when FSDP2 replaces parameters one by one, a new one often gets the ``id`` of the one just freed. The stamp alone
    is not reliable either: ``torch.utils.swap_tensors`` keeps the ``id`` and removes the stamp.

    Args:
        groups: ``param_groups`` to record.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._ids = [list(map(id, group["params"])) for group in groups]
        self._serials = [list(map(_serial, group["params"])) for group in groups]
        self._names = [list(group.get("param_names") or ()) for group in groups]
        self._dims = [[len(whole_shape(p)) for p in group["params"]] for group in groups]

    def holds(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every group has the recorded parameters, in the same order."""
        if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
            return False
        return [list(map(id, group["params"])) for group in groups] == self._ids

    def holds_at(self, groups: Sequence[Mapping[str, Any]], g: int, i: int) -> bool:
        """Whether parameter ``i`` of group ``g`` is the recorded one."""
        return g < len(self._ids) and i < len(self._ids[g]) and self._ids[g][i] == id(groups[g]["params"][i])

    def layout_finder(self, layouts: Sequence[Sequence[AnyLayout]]) -> Callable[[Tensor], TensorLayout | None]:
        """Return a function that returns the layout of a recorded parameter, and None for any other tensor.

        The function is reliable only for parameters that somebody has kept alive since they were recorded.

        Args:
            layouts: the layouts of the recorded parameters, by group position.
        """
        by_serial = self._by_serial()
        by_id = {n: (g, i) for g, ids in enumerate(self._ids) for i, n in enumerate(ids)}

        def layout_of(parameter: Tensor) -> TensorLayout | None:
            position = by_serial.get(getattr(parameter, _STAMP, ""), by_id.get(id(parameter)))
            layout = None if position is None else layouts[position[0]][position[1]]
            return layout if isinstance(layout, TensorLayout) and layout.fits(whole_shape(parameter)) else None

        return layout_of

    def _by_serial(self) -> dict[str, Position]:
        return {serial: (g, i) for g, serials in enumerate(self._serials) for i, serial in enumerate(serials)}

    def positions(self, groups: Sequence[Mapping[str, Any]]) -> list[list[Position | None]]:
        """Return the recorded position of each parameter of the groups; None if it is new or cannot be identified."""
        by_serial = self._by_serial()

        def recorded(parameter: Tensor, g: int, i: int) -> Position | None:
            position = by_serial.get(getattr(parameter, _STAMP, ""))
            return (g, i) if position is None and self.holds_at(groups, g, i) else position

        return [[recorded(p, g, i) for i, p in enumerate(group["params"])] for g, group in enumerate(groups)]

    def edit(
        self,
        groups: Sequence[Mapping[str, Any]],
        layouts: Sequence[Sequence[AnyLayout]],
        name_of: Callable[[Tensor], str],
    ) -> Edit:
        """Compare the groups with the recorded ones.

        Args:
            groups: the groups as they are now.
            layouts: the layouts of the recorded parameters, by group position.
            name_of: returns the name of a parameter from the model or its tag; "" if neither contains it.

        Returns:
            For every parameter its recorded position, and which parameters are new.
        """
        fresh: list[tuple[Tensor, str]] = []
        positions, names = [], []
        for g, (group, recorded) in enumerate(zip(groups, self.positions(groups), strict=True)):
            model_names = [
                name_of(p) if position is None else "" for p, position in zip(group["params"], recorded, strict=True)
            ]
            group_names = self._names_of(group, g, recorded, model_names)
            row = []
            for i, (parameter, position) in enumerate(zip(group["params"], recorded, strict=True)):
                if position is None and not model_names[i] and self._replaces(parameter, group, g, i, layouts):
                    position = (g, i)
                if position is None:
                    position = len(layouts), len(fresh)
                    fresh.append((parameter, group_names[i] if group_names else ""))
                row.append(position)
            positions.append(row)
            names.append([name or f"unnamed.{g}.{i}" for i, name in enumerate(group_names)] if group_names else None)
        return Edit(positions, fresh, names)

    def _replaces(
        self, parameter: Tensor, group: Mapping[str, Any], g: int, i: int, layouts: Sequence[Sequence[AnyLayout]]
    ) -> bool:
        """Whether a new tensor replaces the recorded parameter at its position.

        FSDP2 replaces parameters by tensors of the same shape. Other libraries replace them by flat slices: the state
        of a slice can be saved and loaded, and a step refuses the slice by name.
        """
        if g >= len(self._ids) or len(group["params"]) != len(self._ids[g]) or facts_of(parameter) is not None:
            return False
        shape = whole_shape(parameter)
        return layouts[g][i].fits(shape) or (len(shape) == 1 and self._dims[g][i] > 1)

    def _names_of(
        self, group: Mapping[str, Any], g: int, recorded: Sequence[Position | None], model_names: Sequence[str]
    ) -> list[str]:
        """Return the names of a group's parameters in their present order, or an empty list if the group has no names.

        Names that the caller changed together with the parameters are used as they are. All others follow their
        parameters. A parameter whose name is unknown has the name "".

        Args:
            group: the group as it is now.
            g: its position.
            recorded: the recorded position of each of its parameters.
            model_names: the names of new parameters from the model or a tag; "" for all others.
        """
        current_names = list(group.get("param_names") or ())
        recorded_names = self._names[g] if g < len(self._names) else []
        complete = len(current_names) == len(group["params"])
        if not current_names or (complete and current_names != recorded_names):
            return current_names
        names = []
        for i, position in enumerate(recorded):
            if position is None:
                names.append(model_names[i] or (recorded_names[i] if complete else ""))
            else:
                names.append(self._names[position[0]][position[1]] if self._names[position[0]] else "")
        return names


@dataclass(frozen=True)
class Edit:
    """How the groups differ from the recorded ones.

    Attributes:
        positions: the recorded (group, index) of each parameter. For a new parameter, the group is the number of
            recorded groups and the index counts the entries of ``fresh``.
        fresh: the new parameters with their names; "" for an unknown name.
        names: the names of each group's parameters; None for a group without names.
    """

    positions: list[list[Position]]
    fresh: list[tuple[Tensor, str]]
    names: list[list[str] | None]

    def rename(self, groups: Sequence[dict[str, Any]]) -> None:
        """Write the names into the ``param_names`` of groups that have names."""
        for group, names in zip(groups, self.names, strict=True):
            if names:
                group["param_names"] = names


def _serial(parameter: Tensor) -> str:
    """Return the serial number stamped on a parameter; stamp it if it has none.

    Numbers are unique across processes, because a parameter that was saved and loaded keeps its number.
    """
    if not hasattr(parameter, _STAMP):
        setattr(parameter, _STAMP, f"{_PROCESS}:{next(_NUMBERS)}")
    return str(getattr(parameter, _STAMP))


def require_groups(groups: Sequence[Any], defaults: Mapping[str, Any]) -> None:
    """Check groups that were not added with ``add_param_group``, and add the options that they lack.

    Args:
        groups: ``param_groups``; missing options are set in place.
        defaults: the optimizer's default options.

    Raises:
        TypeError: a group is not a dict with a list of ``params``, or a parameter is not a tensor.
        ValueError: an option is out of range, a parameter is not initialised, or it occurs twice.
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
                    "itself, or pass (name, parameter) pairs to add_param_group"
                )
            where = f"param_groups[{g}]['params'][{i}]"
            if id(parameter) in seen:
                raise ValueError(
                    f"{where} of shape {tuple(parameter.shape)} is the same parameter as {seen[id(parameter)]} and "
                    "would be updated twice; remove one of them"
                )
            seen[id(parameter)] = where
        require_initialised(group, g)
        validate({**defaults, **group}, f"param_groups[{g}] has an invalid option:")
    for group in groups:
        for name, value in defaults.items():
            group.setdefault(name, value)


def _short(value: Any) -> str:
    """Describe a value by its type and at most 60 characters of its ``repr``."""
    text = " ".join(repr(value).split())
    return f"a {type(value).__name__} ({text[:60]}{'...' if len(text) > 60 else ''})"


def require_initialised(group: Mapping[str, Any], g: int) -> None:
    """Refuse lazy parameters, because their shape and blocks are unknown before the first forward pass.

    Raises:
        ValueError: parameter and group are named.
    """
    for i, parameter in enumerate(group["params"]):
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"parameter {i} of group {g} belongs to a lazy module and is not initialised; run one forward pass of "
                "the model before passing the parameter to the optimizer"
            )


class Frozen:
    """Frozen parameters of a model that are in no group; a warning is logged when one of them becomes trainable.

    Args:
        model: the model that the optimizer was built from.
        in_groups: the parameters in the optimizer's groups.
    """

    def __init__(self, model: nn.Module, in_groups: Iterable[Tensor]) -> None:
        seen = set(map(id, in_groups))
        self._waiting: deque[tuple[weakref.ref[nn.Module], str, str]] = deque()
        for path, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and not parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self._waiting.append((weakref.ref(module), leaf, f"{path}.{leaf}" if path else leaf))

    def __len__(self) -> int:
        return len(self._waiting)

    def look(self, groups: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Warn once about parameters that were unfrozen and have a gradient, but are in no group.

        Each call checks a limited number of parameters, so that its cost does not grow with the model.

        Args:
            groups: returns the present groups; it is called only if a warning is due.
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
        """Log the unfrozen parameters that are in no group; stop watching those that are in a group now."""
        in_groups = {id(p) for group in groups for p in group["params"]}
        unfrozen, still_frozen = [], deque[tuple[weakref.ref[nn.Module], str, str]]()
        for module, leaf, name in self._waiting:
            owner = module()
            parameter = None if owner is None else owner._parameters.get(leaf)
            if parameter is None or id(parameter) in in_groups:
                continue
            if parameter.requires_grad:
                unfrozen.append(name)
            else:
                still_frozen.append((module, leaf, name))
        self._waiting = still_frozen
        if unfrozen:
            self._waiting.clear()
            logger.warning(
                "%d parameters were frozen when the optimizer was built and are trainable now, but are in none of its "
                "groups, so they do not train: %s%s. Pass them to optimizer.add_param_group({'params': [(name, "
                "parameter), ...]}), or build the optimizer after unfreezing",
                len(unfrozen),
                ", ".join(unfrozen[:3]),
                ", ..." if len(unfrozen) > 3 else "",
            )
