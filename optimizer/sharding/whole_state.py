"""Whole state from whatever ranks hold, and back: the form in which a checkpoint fits every wrapper.

It is the state dict of one process that never sharded anything, with names: a plain ``AdamMini`` loads it as it is,
``python -m optimizer convert`` writes it, and ranks that shard in any way take their parts of it.
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
from ..partition.layout import Layout
from ..partition.names import clean
from ..state import checkpoint
from ..step.labels import label, named
from .elements import narrow, widen
from .flat import FlatLayout, Range
from .geometry import Box, Geometry
from .holdings import Ranges
from .kinds import local_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..interface import Stepper
    from .shard import Shard

logger = logging.getLogger("optimizer")
_NOT_ELEMENTS = ("step", "exp_avg_sq")


def full_state_dict(optimizer: Stepper, *, rank0_only: bool = True) -> dict[str, Any] | None:
    """The state of whole parameters, gathered tensor by tensor onto the CPU.

    All ranks call it together. It is a state dict with ``param_names``: ``AdamMini(model).load_state_dict`` takes it
    in a process that shards nothing, ``load_full_state_dict`` where anything is sharded.

    Args:
        optimizer: under any wrapper, or none.
        rank0_only: keep it on rank 0 alone; other ranks get None. Pipeline stages, whose ranks hold different
            parameters, set False: every rank then returns what its process groups hold.

    Raises:
        ValueError: parameters without names; build the optimizer from the model or ``named_parameters()``.
    """
    keep = not rank0_only or not dist.is_initialized() or dist.get_rank() == 0
    optimizer.fix_layouts()  # the published package's class fixes its blocks as late as that
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
                    own = decaying if whole.decays else exempt
                    own["params"].append(count)
                    own["param_names"].append(whole.name)
                    count += 1
            groups += [group for group in (decaying, exempt) if group["params"]]
    return {"state": states, "param_groups": groups} if keep else None


def load_full_state_dict(optimizer: Stepper, document: Mapping[str, Any], *, convert: bool = False) -> None:
    """Take this rank's part of the state of whole parameters; nothing is sent.

    Args:
        optimizer: under any wrapper, or none.
        document: as ``full_state_dict`` returned it, a plain AdamMini's, AdamW's or the published package's
            ``state_dict``; the same on every rank, best from ``torch.load(path, mmap=True, weights_only=True)``, which
            reads one tensor at a time.
        convert: rebuild second moments of another partition from block means instead of refusing them.

    Raises:
        ValueError: as of ``AdamMini.load_state_dict``; nothing has changed then.
    """
    optimizer.fix_layouts()
    with optimizer.whole():
        members = [member for g in range(len(optimizer.param_groups)) for member in _members(optimizer, g)]
        virtual = [{**group, "params": [], "param_names": []} for group in optimizer.param_groups]
        layouts: list[list[Layout]] = [[] for _ in virtual]
        taker = {}
        for member in members:
            for k, whole in enumerate(member.wholes):
                stand_in = whole.stand_in(member.parameter)
                taker[id(stand_in)] = member, k
                virtual[member.g]["params"].append(stand_in)
                virtual[member.g]["param_names"].append(whole.name)
                layouts[member.g].append(whole.layout)
        prepared, states = checkpoint.checked(
            virtual, layouts, optimizer.rules, document, convert=convert, exempt=optimizer.undecayed
        )
        for slot, state in states:
            member, k = taker[id(slot.parameter)]
            member.take(k, state)
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
    """One parameter as the model has it; ``decays`` is False where its group's weight decay does not mean it."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    decays: bool = True

    def stand_in(self, parameter: Tensor) -> Tensor:
        """A tensor of the whole shape that takes no memory."""
        return torch.empty((), dtype=parameter.dtype).expand(self.shape)


class _Member:
    """A parameter of the optimizer, and the whole parameters that it holds parts of; this class: one, all of it.

    Attributes:
        g: its group.
        state: what was taken so far.
    """

    def __init__(self, g: int, i: int, parameter: Tensor, wholes: list[Whole], where: str) -> None:
        self.g, self.i, self.parameter, self.wholes = g, i, parameter, wholes
        self.state: dict[str, Any] = {}
        for whole in wholes:
            if not whole.name:
                raise ValueError(
                    f"{where} has no name, by which state of whole parameters is kept; build the optimizer from the "
                    "model or model.named_parameters(), or tag(model) before"
                )

    def gathered(self, optimizer: Stepper) -> Iterator[tuple[Whole, dict[str, Any] | None]]:
        """Each whole parameter and its state."""
        state = optimizer.state.get(self.parameter)
        yield self.wholes[0], _on_cpu(state) if state else None

    def take(self, k: int, state: dict[str, Any]) -> None:
        """Take this rank's part of the k-th whole parameter's state."""
        self.state = {key: x if key == "step" else _moved(x, self.parameter) for key, x in state.items()}

    def finished(self) -> dict[str, Any]:
        """The state, all parts taken."""
        return self.state


class Sharded(_Member):
    """A parameter of which ranks hold parts."""

    def __init__(self, g: int, i: int, shard: Shard, wholes: list[Whole], where: str) -> None:
        super().__init__(g, i, shard.parameter, wholes, where)
        self.shard, self.geometry = shard, shard.geometry

    def _existing(self, optimizer: Stepper) -> dict[str, Any] | None:
        """The state, made where only other ranks have one; None where nobody has."""
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
    """A DTensor."""

    def gathered(self, optimizer: Stepper) -> Iterator[tuple[Whole, dict[str, Any] | None]]:
        state = self._existing(optimizer)
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in (state or {}).items()}
        yield self.wholes[0], _on_cpu(full) if state else None

    def take(self, k: int, state: dict[str, Any]) -> None:
        placed = self.geometry.placed
        assert placed is not None
        self.state = dict(state)
        for key in state.keys() - set(_NOT_ELEMENTS):
            self.state[key] = torch.zeros_like(self.parameter, dtype=state[key].dtype, requires_grad=False)
            local_of(self.state[key]).copy_(_cut(state[key], placed.held))
        second = _moved(_cut(state["exp_avg_sq"], placed.held_second), local_of(self.parameter))
        self.state["exp_avg_sq"] = placed.wrap(second.reshape(self.geometry.aligned))


class _FlatMember(Sharded):
    """Ranges of flattened tensors."""

    def __init__(self, g: int, i: int, shard: Shard, layout: FlatLayout, where: str) -> None:
        wholes = [Whole(clean(r.name), r.shape, r.layout, r.decays) for r in layout.ranges]
        super().__init__(g, i, shard, wholes, where)
        self.ranges = layout.ranges
        self._wide: Tensor | None = None

    def gathered(self, optimizer: Stepper) -> Iterator[tuple[Whole, dict[str, Any] | None]]:
        state = self._existing(optimizer)
        if state is None:
            yield from ((whole, None) for whole in self.wholes)
            return
        group = self.geometry.sharding_groups[0] if self.geometry.sharding_groups else None
        wide = widen(self.geometry, state["exp_avg_sq"])
        for whole, held in zip(self.wholes, self.ranges, strict=True):
            elements = {
                key: _gathered(x, held, group).view(whole.shape) for key, x in state.items() if key not in _NOT_ELEMENTS
            }
            second = narrow(_alone(whole), _gathered(wide, held, group).view(whole.shape))
            yield whole, {"step": state["step"].clone().cpu(), **elements, "exp_avg_sq": second}

    def take(self, k: int, state: dict[str, Any]) -> None:
        if self._wide is None:
            self._wide = torch.zeros_like(self.parameter, dtype=state["exp_avg_sq"].dtype, requires_grad=False)
            own = {key: torch.zeros_like(self.parameter, dtype=x.dtype, requires_grad=False)
                   for key, x in state.items() if key not in _NOT_ELEMENTS}  # fmt: skip
            self.state = {"step": state["step"], **own}
        held, whole = self.ranges[k], self.wholes[k]
        here = slice(held.offset, held.offset + held.stop - held.start)
        for key in self.state.keys() - set(_NOT_ELEMENTS):
            self.state[key][here] = state[key].reshape(-1)[held.start : held.stop]
        spread = widen(_alone(whole), state["exp_avg_sq"])
        self._wide[here] = spread.reshape(-1)[held.start : held.stop].to(self._wide)

    def finished(self) -> dict[str, Any]:
        assert self._wide is not None
        return {**self.state, "exp_avg_sq": narrow(self.geometry, self._wide)}


def _members(optimizer: Stepper, g: int) -> Iterable[_Member]:
    """What the optimizer steps in a group, in order."""
    group = optimizer.param_groups[g]
    for i, ((parameter, name), layout) in enumerate(zip(named(group), optimizer.layouts[g], strict=True)):
        where = label(group, g, i)
        shard = optimizer.shard_of(g, i)
        if isinstance(layout, FlatLayout):
            assert shard is not None
            yield _FlatMember(g, i, shard, layout, where)
            continue
        assert isinstance(layout, Layout)
        whole = Whole(clean(name or tagged_name(parameter)), tuple(parameter.shape), layout)
        if shard is None:
            yield _Member(g, i, parameter, [whole], where)
        else:
            yield _PlacedMember(g, i, shard, [whole], where)


def _alone(whole: Whole) -> Geometry:
    """All of a parameter, in one process."""
    return Geometry(whole.shape, (Box(whole.layout),), whole.layout.aligned_shape(whole.shape))


def _gathered(local: Tensor, held: Range, group: ProcessGroup | None) -> Tensor:
    """All elements of a flattened tensor, 1-D on the CPU, from what the ranks of a group hold of it."""
    own = local[held.offset : held.offset + held.stop - held.start]
    if group is None:
        return own.clone().cpu()
    lengths = [stop - start for start, stop in held.bounds]
    message = torch.zeros(max(lengths), dtype=own.dtype, device=_device(group))
    message[: len(own)] = own
    parts = [torch.empty_like(message) for _ in lengths]
    dist.all_gather(parts, message, group=group)
    out = torch.zeros(prod(held.shape), dtype=own.dtype)
    for part, (start, stop) in zip(parts, held.bounds, strict=True):
        out[start:stop] = part[: stop - start].cpu()
    return out


def _device(group: ProcessGroup) -> torch.device:
    """Where a group communicates; the CPU where it can."""
    types = {device.type: device for device in group._device_types}
    return types.get("cpu") or next(iter(types.values()))


def _cut(whole: Tensor, held: Mapping[int, Ranges]) -> Tensor:
    """The part of a whole tensor at the indices held along each axis."""
    for axis, ranges in held.items():
        geometries = [whole.narrow(axis, start, stop - start) for start, stop in ranges]
        whole = torch.cat(geometries, axis) if geometries else whole.narrow(axis, 0, 0)
    return whole


def _moved(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device, copy=True)


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone().cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
