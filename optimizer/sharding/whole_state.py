"""State of whole parameters, gathered from shards and split into shards again.

This is the form of a checkpoint that fits every wrapper: the state dict of one process that shards nothing, with names.
A plain ``AdamMini`` loads it, ``python -m optimizer convert`` writes it, and ranks with any sharding load their shards
from it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..partition.discover import tagged_name
from ..partition.factored import FactoredLayout, TensorLayout
from ..partition.names import clean
from ..state import checkpoint
from ..state.factored import factored
from ..step.dtypes import second_moment_dtype
from ..step.labels import label, named
from ..step.moments import format_of, quantises, row_axes
from .columns import unsharded
from .elements import narrow, widen
from .flat import FlatLayout, Range
from .flat_columns import columns_size, held_columns
from .holdings import Ranges
from .kinds import local_of
from .moment_forms import by_element, quantised, widened
from .placed_moments import place_of, wrapped

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..interface import Stepper
    from .shard import Shard

logger = logging.getLogger("optimizer")
_NOT_ELEMENTS = ("step", "exp_avg_sq", "exp_avg_sq_col")  # entries of a state that do not have one value per element


def full_state_dict(optimizer: Stepper, *, rank0_only: bool = True) -> dict[str, Any] | None:
    """Return the state of whole parameters, gathered tensor by tensor onto the CPU.

    All ranks must make this call together. The result is a state dict with ``param_names``. A process that shards
    nothing loads it with ``AdamMini(model).load_state_dict``; ranks that shard load it with ``load_full_state_dict``.

    Args:
        optimizer: the optimizer, under any wrapper or none.
        rank0_only: return the state on rank 0 only; other ranks return None. Set this to False for pipeline stages,
            whose ranks have different parameters: every rank then returns the parameters of its process groups.

    Returns:
        The state dict, or None on ranks other than 0 with ``rank0_only``.

    Raises:
        ValueError: a parameter has no name; build the optimizer from the model or ``named_parameters()``.
    """
    keep = not rank0_only or not dist.is_initialized() or dist.get_rank() == 0
    optimizer.fix_layouts()  # the published package's class chooses its blocks only at the first step
    states: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    count = 0
    with optimizer.whole():
        for g, group in enumerate(optimizer.param_groups):
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            rules = checkpoint.identity(optimizer.rules)
            decaying: dict[str, Any] = {"params": [], "param_names": [], "rules": rules, **options}
            exempt: dict[str, Any] = {**decaying, "params": [], "param_names": [], "weight_decay": 0.0}
            for member in _members(optimizer, g):
                for whole, state in member.gathered(optimizer):
                    if keep and state:
                        states[count] = state
                    saved_group = decaying if whole.decays else exempt
                    saved_group["params"].append(count)
                    saved_group["param_names"].append(whole.name)
                    count += 1
            groups += [group for group in (decaying, exempt) if group["params"]]
    return {"state": states, "param_groups": groups} if keep else None


def load_full_state_dict(optimizer: Stepper, document: Mapping[str, Any], *, convert: bool = False) -> None:
    """Load this rank's shards from the state of whole parameters, without communication.

    Args:
        optimizer: the optimizer, under any wrapper or none.
        document: the result of ``full_state_dict``, or the ``state_dict`` of a plain AdamMini, AdamW or the published
            package. It must be the same on every rank. ``torch.load(path, mmap=True, weights_only=True)`` is the best
            way to read it, because it reads one tensor at a time.
        convert: rebuild second moments of another partition from block means instead of refusing them.

    Raises:
        ValueError: the state belongs to another partition, other parameters or another kind of optimizer, as in
            ``AdamMini.load_state_dict``. Nothing has changed.
    """
    optimizer.fix_layouts()
    with optimizer.whole():
        members = [member for g in range(len(optimizer.param_groups)) for member in _members(optimizer, g)]
        virtual = [{**group, "params": [], "param_names": []} for group in optimizer.param_groups]
        layouts: list[list[TensorLayout]] = [[] for _ in virtual]
        targets = {}
        for member in members:
            for k, whole in enumerate(member.wholes):
                stand_in = whole.stand_in(member.parameter)
                targets[id(stand_in)] = member, k
                virtual[member.g]["params"].append(stand_in)
                virtual[member.g]["param_names"].append(whole.name)
                layouts[member.g].append(whole.layout)
        prepared, states = checkpoint.checked(
            virtual, layouts, optimizer.rules, document, convert=convert, exempt=optimizer.undecayed
        )
        for slot, state in states:
            member, k = targets[id(slot.parameter)]
            member.load(k, state)
        for member in members:
            if member.state:
                optimizer.state[member.parameter] = member.finished()
        for group, loaded in zip(optimizer.param_groups, prepared.groups, strict=True):
            group.update({key: value for key, value in loaded.items() if key not in ("params", "param_names")})
        if prepared.notes:
            notes = "; ".join(f"{note} ({n}x)" for note, n in prepared.notes.items())
            logger.info("loaded state of whole parameters: %s", notes)


@dataclass(frozen=True)
class Whole:
    """One whole parameter of the model.

    Attributes:
        name: its name in the model.
        shape: its shape.
        layout: its layout.
        decays: whether its group's weight decay applies to it.
    """

    name: str
    shape: tuple[int, ...]
    layout: TensorLayout
    decays: bool = True

    def stand_in(self, parameter: Tensor) -> Tensor:
        """Return a tensor of the whole shape that needs no memory."""
        return torch.empty((), dtype=parameter.dtype).expand(self.shape)


class _Member:
    """A parameter of the optimizer, and the whole parameters whose elements it contains.

    This class is for a parameter that is not sharded, so that it is one whole parameter. Subclasses are for shards.

    Attributes:
        g: position of its group.
        i: position of the parameter in the group.
        parameter: the parameter.
        wholes: the whole parameters.
        state: the local state loaded so far.
    """

    def __init__(self, g: int, i: int, parameter: Tensor, wholes: list[Whole], where: str) -> None:
        self.g, self.i, self.parameter, self.wholes = g, i, parameter, wholes
        self.state: dict[str, Any] = {}
        for whole in wholes:
            if not whole.name:
                raise ValueError(
                    f"{where} has no name, but state of whole parameters is stored by name; build the optimizer from "
                    "the model or model.named_parameters(), or call tag(model) before"
                )

    def gathered(self, optimizer: Stepper) -> Iterator[tuple[Whole, dict[str, Any] | None]]:
        """Yield each whole parameter and its state on the CPU; None if it has no state."""
        state = optimizer.state.get(self.parameter)
        yield self.wholes[0], _on_cpu(state) if state else None

    def load(self, k: int, state: dict[str, Any]) -> None:
        """Load this rank's shard of the k-th whole parameter's state."""
        self.state = {key: x if key == "step" else _moved(x, self.parameter) for key, x in state.items()}

    def finished(self) -> dict[str, Any]:
        """Return the local state, after ``load`` was called for every whole parameter."""
        return self.state


class Sharded(_Member):
    """A sharded parameter."""

    def __init__(self, g: int, i: int, shard: Shard, wholes: list[Whole], where: str) -> None:
        super().__init__(g, i, shard.parameter, wholes, where)
        self.shard, self.geometry = shard, shard.geometry

    def _existing(self, optimizer: Stepper) -> dict[str, Any] | None:
        """Return the local state, created if only other ranks have one; None if no rank has any."""
        state = optimizer.state.get(self.parameter)
        step = torch.tensor(float(state["step"]) if state else -1.0)
        for group in self.geometry.sharding_groups:
            step = step.to(_device(group))
            dist.all_reduce(step, dist.ReduceOp.MAX, group=group)
        if step < 0:
            return None
        if not state:
            state = optimizer.state_of(self.g, self.i)
            state["step"].fill_(float(step))
        return state


class _PlacedMember(Sharded):
    """A DTensor parameter."""

    def gathered(self, optimizer: Stepper) -> Iterator[tuple[Whole, dict[str, Any] | None]]:
        state = self._existing(optimizer)
        if not state:
            yield self.wholes[0], None
            return
        wide = widened(self.shard, self.parameter, optimizer.param_groups[self.g], state)
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in ({**state, **wide}).items()}
        if wide:
            format, shape = format_of(local_of(state["exp_avg"])), self.wholes[0].shape
            place = place_of(shape, {})
            step = int(state["step"])
            both = quantised(full["exp_avg"], full["exp_avg_scale"], format, place, step=step, seed=self.i)
            full["exp_avg"], full["exp_avg_scale"] = both
        yield self.wholes[0], _on_cpu(full)

    def load(self, k: int, state: dict[str, Any]) -> None:
        placed = self.geometry.placed
        assert placed is not None
        self.state = dict(state)
        elements = state.keys() - set(_NOT_ELEMENTS)
        if "exp_avg_scale" in state:
            self._load_quantised(state)
            elements -= {"exp_avg", "exp_avg_scale"}
        for key in elements:
            self.state[key] = torch.zeros_like(self.parameter, dtype=state[key].dtype, requires_grad=False)
            local_of(self.state[key]).copy_(_cut(state[key], placed.held))
        second = _moved(_cut(state["exp_avg_sq"], placed.held_second), local_of(self.parameter))
        self.state["exp_avg_sq"] = placed.wrap(second.reshape(self.geometry.aligned))
        if self.geometry.columns is not None and (of_columns := self.geometry.columns.placed) is not None:
            columns = _moved(_cut(state["exp_avg_sq_col"], of_columns.held_second), local_of(self.parameter))
            self.state["exp_avg_sq_col"] = of_columns.wrap(columns.reshape(self.geometry.columns.shape))

    def _load_quantised(self, state: Mapping[str, Any]) -> None:
        """Load this rank's shard of a quantised first moment; pieces of rows are quantised anew."""
        placed, place, local = self.geometry.placed, self.shard.place, local_of(self.parameter)
        assert placed is not None and place is not None
        codes, scale = state["exp_avg"], state["exp_avg_scale"]
        format, shape = format_of(codes), self.wholes[0].shape
        if not self.shard.by_element:
            codes, scale = _cut(codes, placed.held), _cut(scale, placed.held)
        else:
            whole = by_element(codes, scale, shape, row_axes(shape), second_moment_dtype(self.parameter))
            values, scales = (_cut(x, placed.held) for x in whole)
            step = int(state["step"])
            codes, scale = quantised(values, scales, format, place, step=step, seed=self.i)
        self.state |= wrapped(self.parameter, _moved(codes, local), _moved(scale, local), format)  # type: ignore[arg-type]


class _FlatMember(Sharded):
    """A flat parameter that contains ranges of flattened tensors."""

    def __init__(self, g: int, i: int, shard: Shard, layout: FlatLayout, where: str) -> None:
        wholes = [Whole(clean(r.name), r.shape, r.layout, r.decays) for r in layout.ranges]
        super().__init__(g, i, shard, wholes, where)
        self.ranges = layout.ranges
        assert shard.flat is not None
        self.flat = shard.flat
        self._second_per_element: Tensor | None = None
        self._columns: dict[int, Tensor] = {}

    def gathered(self, optimizer: Stepper) -> Iterator[tuple[Whole, dict[str, Any] | None]]:
        state = self._existing(optimizer)
        if state is None:
            yield from ((whole, None) for whole in self.wholes)
            return
        group = self.geometry.sharding_groups[0] if self.geometry.sharding_groups else None
        second_per_element = widen(self.geometry, state["exp_avg_sq"], state.get("exp_avg_sq_col"))
        every = {**state, **widened(self.shard, self.parameter, optimizer.param_groups[self.g], state)}
        for k, (whole, held) in enumerate(zip(self.wholes, self.ranges, strict=True)):
            elements = {
                key: _gathered(x, held, group).view(whole.shape) for key, x in every.items() if key not in _NOT_ELEMENTS
            }
            if (scales := elements.pop("exp_avg_scale", None)) is not None and quantises(whole.shape):
                assert self.flat.requested is not None
                args = elements["exp_avg"], scales, self.flat.requested, place_of(whole.shape, {})
                both = quantised(*args, step=int(state["step"]), seed=self.i + k)
                elements["exp_avg"], elements["exp_avg_scale"] = both
            second = _second_moment(whole, _gathered(second_per_element, held, group).view(whole.shape))
            yield whole, {"step": state["step"].clone().cpu(), **elements, **second}

    def load(self, k: int, state: dict[str, Any]) -> None:
        state, second = self._by_element(k, state), self._second_per_element
        if second is None:
            second = torch.zeros_like(self.parameter, dtype=state["exp_avg_sq"].dtype, requires_grad=False)
            self._second_per_element = second
            elements = {
                key: torch.zeros_like(self.parameter, dtype=x.dtype, requires_grad=False)
                for key, x in state.items()
                if key not in _NOT_ELEMENTS
            }
            self.state = {"step": state["step"], **elements}
        held, whole = self.ranges[k], self.wholes[k]
        local = slice(held.offset, held.offset + held.stop - held.start)
        for key in self.state.keys() - set(_NOT_ELEMENTS):
            self.state[key][local] = state[key].reshape(-1)[held.start : held.stop]
        layout = whole.layout
        if isinstance(layout, FactoredLayout):
            self._columns[k] = held_columns(held, state["exp_avg_sq_col"])
            layout = layout.rows
        spread = widen(unsharded(layout, whole.shape), state["exp_avg_sq"])
        second[local] = spread.reshape(-1)[held.start : held.stop].to(second)

    def _by_element(self, k: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return the k-th whole parameter's state with its first moment by element, if the group quantises moments."""
        if self.flat.requested is None:
            return state
        shape, moment, scale = self.wholes[k].shape, state["exp_avg"], state.get("exp_avg_scale")
        if scale is None:
            both = moment.to(self.flat.dtype), torch.zeros(shape, dtype=self.flat.dtype)
        else:
            both = by_element(moment, scale, shape, row_axes(shape), self.flat.dtype)
        return {**state, "exp_avg": both[0], "exp_avg_scale": both[1]}

    def finished(self) -> dict[str, Any]:
        assert self._second_per_element is not None
        scales = self.state.pop("exp_avg_scale", None)
        if self.flat.format is not None:
            step = int(self.state["step"])
            self.state |= self.flat.quantised(self.state["exp_avg"], scales, step=step, seed=self.i)
        second = narrow(self.geometry, self._second_per_element)
        if self.geometry.columns is None:
            return {**self.state, "exp_avg_sq": second}
        joined = [self._columns.get(k, second.new_zeros(columns_size(held))) for k, held in enumerate(self.ranges)]
        return {**self.state, "exp_avg_sq": second, "exp_avg_sq_col": torch.cat(joined).to(second)}


def _members(optimizer: Stepper, g: int) -> Iterable[_Member]:
    """Yield the parameters of one of the optimizer's groups, in order."""
    group = optimizer.param_groups[g]
    for i, ((parameter, name), layout) in enumerate(zip(named(group), optimizer.layouts[g], strict=True)):
        where = label(group, g, i)
        shard = optimizer.shard_of(g, i)
        if isinstance(layout, FlatLayout):
            assert shard is not None
            yield _FlatMember(g, i, shard, layout, where)
            continue
        assert isinstance(layout, TensorLayout)
        whole = Whole(clean(name or tagged_name(parameter)), tuple(parameter.shape), layout)
        if shard is None:
            yield _Member(g, i, parameter, [whole], where)
        else:
            yield _PlacedMember(g, i, shard, [whole], where)


def _second_moment(whole: Whole, elements: Tensor) -> dict[str, Tensor]:
    """Return the second moment of a whole parameter as one process stores it, from one value per element."""
    if isinstance(whole.layout, FactoredLayout):
        rows, columns = factored(elements, whole.layout, whole.shape, elements.dtype)
        return {"exp_avg_sq": rows, "exp_avg_sq_col": columns}
    return {"exp_avg_sq": narrow(unsharded(whole.layout, whole.shape), elements)}


def _gathered(local: Tensor, held: Range, group: ProcessGroup | None) -> Tensor:
    """Gather all elements of a flattened tensor.

    Args:
        local: this rank's flat tensor.
        held: the range of the flattened tensor that each rank stores.
        group: process group of these ranks; None if this rank has all elements.

    Returns:
        A new 1-D tensor on the CPU.
    """
    elements = local[held.offset : held.offset + held.stop - held.start]
    if group is None:
        return elements.clone().cpu()
    lengths = [stop - start for start, stop in held.bounds]
    message = torch.zeros(max(lengths), dtype=elements.dtype, device=_device(group))
    message[: len(elements)] = elements
    received = [torch.empty_like(message) for _ in lengths]
    dist.all_gather(received, message, group=group)
    out = torch.zeros(prod(held.shape), dtype=elements.dtype)
    for values, (start, stop) in zip(received, held.bounds, strict=True):
        out[start:stop] = values[: stop - start].cpu()
    return out


def _device(group: ProcessGroup) -> torch.device:
    """Return a device on which a group communicates, the CPU if possible."""
    types = {device.type: device for device in group._device_types}
    return types.get("cpu") or next(iter(types.values()))


def _cut(whole: Tensor, held: Mapping[int, Ranges]) -> Tensor:
    """Return the part of a whole tensor at this rank's indices along each sharded axis."""
    for axis, ranges in held.items():
        slices = [whole.narrow(axis, start, stop - start) for start, stop in ranges]
        whole = torch.cat(slices, axis) if slices else whole.narrow(axis, 0, 0)
    return whole


def _moved(value: Tensor, like: Tensor) -> Tensor:
    """Copy a tensor to the device of another tensor."""
    return value.to(like.device, copy=True)


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a state to the CPU."""
    return {k: v.detach().clone().cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
