"""The sharded parameters of one optimizer, as its step sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..interface import Position, wrappers
from ..partition.layout import AnyLayout, Layout
from ..step.dtypes import moment_dtype, rounding_of, second_moment_dtype
from ..step.engines.checks import require_takeable
from ..step.labels import label
from .agreement import require_agreement
from .elements import is_blockwise, narrow, settle, widen
from .exchange import destroyed, ranks_of, second_moments
from .flat import FlatLayout, flat_geometry
from .geometry import Box, Geometry
from .kinds import is_dtensor, local_of
from .shard import Shard
from .step_view import StepView

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shards:
    """Which parameters of an optimizer are sharded, by group position, and how their step is taken.

    The parameters' local tensors are shown to the engines as a group of ordinary tensors; only tensors with a block
    that other ranks share are stepped here.
    """

    def __init__(self) -> None:
        self._known: dict[Position, Shard] = {}
        self._agreed: dict[tuple[int, ...], int] = {}
        self._fresh = False

    def of(self, g: int, i: int, group: Mapping[str, Any], layout: AnyLayout) -> Shard | None:
        """What is held of a parameter; None for an ordinary one."""
        parameter = group["params"][i]
        known = self._known.get((g, i))
        if known is not None and known.spec is not None and known.fits(parameter):
            return known
        if not is_sharded(parameter, layout):
            return None
        if known is None or not known.fits(parameter):
            known = self._known[g, i] = Shard(parameter, _geometry_of(parameter, layout, label(group, g, i)))
            self._fresh = True
        return known

    def settle(
        self, groups: Sequence[dict[str, Any]], layouts: Sequence[list[AnyLayout]], states: Mapping[Tensor, Any]
    ) -> None:
        """Bring state that others wrote element by element into its own form."""
        steps: set[int] = set()
        for g, group in enumerate(groups):
            for i, parameter in enumerate(group["params"]):
                if state := states.get(parameter):
                    shard = self.of(g, i, group, layouts[g][i])
                    if shard is not None:
                        settle(state, shard.geometry, moment_dtype(parameter, group), steps)

    def widened(
        self, document: dict[str, Any], groups: Sequence[dict[str, Any]], layouts: Sequence[list[AnyLayout]]
    ) -> dict[str, Any]:
        """A state dict in which second moments of flattened parameters have one value per element."""
        return _changed(document, {
            key: widen(geometry, document["state"][key]["exp_avg_sq"])
            for key, geometry, _ in self._second_moments(document, groups, layouts, flattened=True)
            if "exp_avg_sq" in document["state"].get(key, {})
        })  # fmt: skip

    def narrowed(
        self,
        document: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[AnyLayout]],
        *,
        convert: bool,
    ) -> dict[str, Any]:
        """A state dict in which second moments of sharded parameters have the form they are kept in.

        Args:
            document: second moments of flattened parameters have one value per element.
            groups, layouts: the optimizer's.
            convert: values that differ inside a block become the block's mean, over all ranks that share it; all of
                them load together.

        Raises:
            ValueError: values that differ inside a block, without ``convert``.
        """
        new: dict[Any, Tensor] = {}
        works: dict[Any, tuple[Geometry, Tensor | None, torch.dtype]] = {}
        for key, geometry, (g, i) in self._second_moments(document, groups, layouts, flattened=True):
            values = document["state"].get(key, {}).get("exp_avg_sq")
            if convert and (values is not None or geometry.cut is not None):
                # A rank that holds nothing of a tensor has no state of it, and takes part nevertheless.
                dtype = second_moment_dtype(groups[g]["params"][i])
                works[key] = geometry, None if values is None else values.to(dtype).sqrt(), dtype
            elif values is None:
                continue
            elif not is_blockwise(geometry, values):
                raise ValueError(
                    f"exp_avg_sq of {label(groups[g], g, i)} differs inside a block: it was kept for other blocks "
                    "(Adam's and AdamW's are one element each); pass convert=True on every rank, or use the rules it "
                    "was kept under"
                )
            else:
                new[key] = narrow(geometry, values)
        if convert:
            for key, geometry, (g, i) in self._second_moments(document, groups, layouts, flattened=False):
                values = document["state"].get(key, {}).get("exp_avg_sq")
                parameter = groups[g]["params"][i]
                alike = values is not None and getattr(values, "placements", None) == parameter.placements
                if alike and values.shape == parameter.shape:
                    works[key] = geometry, local_of(values).sqrt(), values.dtype
            for key, second in zip(works, second_moments(list(works.values())), strict=True):
                if works[key][1] is not None:
                    new[key] = works[key][0].second_moment(second)
        return _changed(document, new)

    def _second_moments(
        self,
        document: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[AnyLayout]],
        *,
        flattened: bool,
    ) -> Iterator[tuple[Any, Geometry, Position]]:
        """Keys of a document's states of flattened parameters or else of DTensors, whether they are there or not."""
        places = [(g, i) for g, own in enumerate(layouts) for i in range(len(own))]
        sharded = any(is_sharded(groups[g]["params"][i], layouts[g][i]) or _saves_elements(groups[g]["params"][i])
                      for g, i in places)  # fmt: skip
        if not sharded or not isinstance(document.get("state"), Mapping) or "param_groups" not in document:
            return  # what is no state dict is refused elsewhere
        keys = [key for saved in document["param_groups"] for key in saved["params"]]
        for (g, i), key in zip(places, keys, strict=False):
            group, layout = groups[g], layouts[g][i]
            parameter = group["params"][i]
            # Where FSDP has nothing to shard (one rank) it must save what it saves on several.
            is_flat = isinstance(layout, FlatLayout) or _saves_elements(parameter)
            wanted = is_flat if flattened else is_dtensor(parameter)
            if wanted:
                shard, shape = self.of(g, i, group, layout), tuple(parameter.shape)
                if shard is not None:
                    yield key, shard.geometry, (g, i)
                elif isinstance(layout, Layout):
                    yield key, Geometry(shape, (Box(layout),), layout.aligned_shape(shape)), (g, i)

    def begin(
        self,
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[AnyLayout]],
        states: Mapping[Tensor, Any],
        which: Iterable[int],
        only: int | None = None,
    ) -> StepView:
        """Look at every parameter that takes part in a step.

        Raises:
            RuntimeError: ranks hold different things (asked before the first step, and after a change), or a gradient
                that does not fit; nothing has been stepped then.
            ValueError: a parameter that cannot be stepped as it is placed.
        """
        view = StepView(groups, layouts, states)
        try:
            for g in which:
                if any(map(is_sharded, groups[g]["params"], layouts[g])):
                    self._localise(view, g, groups[g], layouts[g], states, only)
            if self._fresh:
                self._agree(groups, layouts)
                self._fresh = False
        except BaseException:
            view.end()
            raise
        return view

    def _localise(
        self,
        view: StepView,
        g: int,
        group: dict[str, Any],
        layouts: list[AnyLayout],
        states: Mapping[Tensor, Any],
        only: int | None,
    ) -> None:
        """Put local tensors in the place of the group's sharded parameters."""
        params, own_layouts, own_states = list(group["params"]), cast(list[Layout], list(layouts)), {}
        names = list(group.get("param_names") or [f"parameter {i}" for i in range(len(params))])
        unusual = isinstance(group["exp_avg_dtype"], str) or group["bf16_rounding"] or group["differentiable"]
        for i, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
            shard = self.of(g, i, group, layout)
            if shard is None:
                own_states[parameter] = states.get(parameter, {})
                continue
            shard.refresh()
            geometry = shard.geometry
            if unusual:
                _require_options(parameter, geometry, group, label(group, g, i))
            params[i] = shard.view
            if geometry.boxes:  # without any, no engine looks at the layout
                own_layouts[i] = geometry.boxes[0].layout
            first = len(params)
            params += [free.view for free in shard.free]
            own_layouts += [part.layout for part in geometry.free]
            names += [f"a part of {names[i]}"] * len(shard.free)
            if only is not None and only != i:
                continue
            grad = shard.local_gradient(partial(label, group, g, i))
            state = shard.local_state(states.get(parameter) or {})
            if geometry.cut is not None:
                if grad is not None:
                    plain = {**group, "fused": False}  # what ranks share is stepped in torch operations in any case
                    require_takeable(shard.view, grad, state, plain, label(group, g, i))
                view.cut[g, i] = (shard, grad)
                for k, free in enumerate(shard.free if grad is not None else ()):
                    view.free[g, first + k] = (i, free)
                    view.lend(free.view, free.gradient(grad))  # type: ignore[arg-type]
                    own_states[free.view] = free.state(state) if state else {}
            elif grad is not None and geometry.boxes:
                view.lend(shard.view, shard.gradient(grad))
                own_states[shard.view] = state
            elif grad is not None:
                view.empty.append((g, i))
        view.groups[g] = {**group, "params": params, "param_names": names}
        view.layouts[g], view.states[g] = own_layouts, own_states

    def _agree(self, groups: Sequence[Mapping[str, Any]], layouts: Sequence[list[AnyLayout]]) -> None:
        """Ask every group that shards something whether its ranks hold the same."""
        facts: dict[tuple[int, ...], tuple[ProcessGroup, list[tuple[str, str]]]] = {}
        for g, group in enumerate(groups):
            for i, layout in enumerate(layouts[g]):
                shard = self.of(g, i, group, layout)
                for process_group in shard.geometry.sharding_groups if shard is not None else ():
                    entry = facts.setdefault(ranks_of(process_group), (process_group, []))
                    entry[1].append((label(group, g, i), shard.geometry.signature))  # type: ignore[union-attr]
        for ranks, (process_group, held) in facts.items():
            digest = hash(tuple(held))
            if self._agreed.get(ranks) != digest:
                require_agreement(process_group, held)
                self._agreed[ranks] = digest


def _changed(document: dict[str, Any], seconds: Mapping[Any, Tensor]) -> dict[str, Any]:
    """A state dict with other second moments."""
    if not seconds:
        return document
    states = dict(document["state"])
    states.update({key: {**states[key], "exp_avg_sq": second} for key, second in seconds.items()})
    return {**document, "state": states}


def _saves_elements(parameter: Tensor) -> bool:
    """Whether a library saves the parameter's state element by element, even where one rank has all of it."""
    return any(wrapper.saves_elements(parameter) for wrapper in wrappers())


def is_sharded(parameter: Tensor, layout: AnyLayout) -> bool:
    """Whether a rank holds less of the parameter than its layout speaks of, or another form of it."""
    return is_dtensor(parameter) or isinstance(layout, FlatLayout)


def _require_options(parameter: Tensor, geometry: Geometry, group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for options that a sharded parameter cannot have."""
    if isinstance(group["exp_avg_dtype"], str):
        raise ValueError(
            f"{where} is sharded, and exp_avg_dtype={group['exp_avg_dtype']!r} keeps scales that do not reshard with "
            "it; use None, torch.float32 or torch.bfloat16"
        )
    if geometry.cut is not None and rounding_of(parameter, group):
        raise ValueError(
            f"{where} shares blocks with other ranks, whose step does not round ({group['bf16_rounding']!r}); use "
            "bf16_rounding=None, or fp32 parameters with a mixed-precision policy"
        )
    if group["differentiable"]:
        raise ValueError(f"{where} is sharded; differentiable=True takes ordinary tensors only")


def _geometry_of(parameter: Tensor, layout: AnyLayout, where: str) -> Geometry:
    if not isinstance(layout, FlatLayout):
        from .placed import placed_geometry

        assert isinstance(layout, Layout)
        return placed_geometry(parameter, layout, where)  # type: ignore[arg-type]
    layout.require(parameter.shape, where)
    if not layout.group:
        return flat_geometry(layout.ranges, layout.numel, None, parameter.device, where)
    try:
        group = dist.distributed_c10d._resolve_process_group(layout.group)  # type: ignore[arg-type]
    except (RuntimeError, KeyError) as error:
        raise destroyed(f"the process group that {where} is sharded over") from error
    device = parameter.device
    if device.type not in {one.type for one in group._device_types}:  # offloaded: sent from where the group can
        device = group._device_types[0]
    return flat_geometry(layout.ranges, layout.numel, group, device, where)
