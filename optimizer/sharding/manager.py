"""The sharded parameters of one optimizer: their shards, their step, and the form of their state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..interface import Position
from ..partition.factored import TensorLayout
from ..partition.layout import AnyLayout
from ..step.dtypes import moment_dtype, second_moment_dtype
from ..step.engines import PLACES, SEEDS, seed_of
from ..step.engines.checks import require_takeable
from ..step.labels import label
from ..step.places import Place
from . import moment_forms
from .agreement import require_agreement
from .columns import unsharded
from .elements import is_blockwise, narrow, settle, widen
from .exchange import Work, ranks_of, second_moments
from .flat import FlatLayout
from .geometry import Geometry
from .kinds import is_dtensor, local_of
from .shard import Shard
from .sharded import any_sharded, flat_moment, geometry_of, is_sharded, report_cut_rows, saves_elements
from .step_view import StepView

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shards:
    """The shards of an optimizer's parameters, by position.

    Engines step the local tensors of sharded parameters as if they were ordinary tensors. Only tensors that share
    blocks with other ranks are stepped in this room.
    """

    def __init__(self) -> None:
        self._shards: dict[Position, Shard] = {}
        self._agreed: dict[tuple[int, ...], int] = {}  # ranks of a group -> hash of what they agreed on
        self._must_agree = False  # whether shards were made since the last check

    def of(self, g: int, i: int, group: Mapping[str, Any], layout: AnyLayout) -> Shard | None:
        """Return the shard of a parameter, or None if the parameter is not sharded.

        Args:
            g: position of the group.
            i: position of the parameter in the group.
            group: the group.
            layout: layout of the parameter.
        """
        parameter = group["params"][i]
        shard = self._shards.get((g, i))
        if shard is not None and shard.spec is not None and shard.fits(parameter):
            return shard
        if not is_sharded(parameter, layout):
            return None
        if shard is None or not shard.fits(parameter) or not shard.stores(group):
            flat = flat_moment(parameter, layout, group)
            geometry = geometry_of(parameter, layout, label(group, g, i), flat)
            shard = self._shards[g, i] = Shard(parameter, geometry, flat)
            self._must_agree = True
        return shard

    def settle(
        self, groups: Sequence[dict[str, Any]], layouts: Sequence[list[AnyLayout]], states: Mapping[Tensor, Any]
    ) -> None:
        """Convert state that a library wrote element by element to the form that the optimizer stores, in place.

        Args:
            groups: the optimizer's parameter groups.
            layouts: the layouts of their parameters, by group.
            states: the state of every parameter that has one.
        """
        steps: set[int] = set()
        factored: list[tuple[dict[str, Any], Geometry]] = []
        for g, group in enumerate(groups):
            for i, parameter in enumerate(group["params"]):
                if state := states.get(parameter):
                    shard = self.of(g, i, group, layouts[g][i])
                    if shard is not None:
                        written = settle(state, shard.geometry, steps)
                        if shard.flat is not None and "exp_avg" in state and (written or shard.flat.format is not None):
                            moment_forms.settled(shard.flat, state, moment_dtype(parameter, group))
                        if shard.geometry.columns is not None and "exp_avg_sq_col" not in state:
                            factored.append((state, shard.geometry))
        works = [Work(geometry, x["exp_avg_sq"].sqrt(), x["exp_avg_sq"].dtype) for x, geometry in factored]
        for (state, _), second in zip(factored, second_moments(works), strict=True):
            state.update(second)

    def widened(
        self, document: dict[str, Any], groups: Sequence[dict[str, Any]], layouts: Sequence[list[AnyLayout]]
    ) -> dict[str, Any]:
        """Return a state dict that can be divided among other ranks.

        Second moments of flattened parameters have one value per element, and so have quantised first moments if ranks
        hold pieces of rows (``moment_forms``).

        Args:
            document: the optimizer's state dict; not changed.
            groups: the optimizer's parameter groups.
            layouts: the layouts of their parameters, by group.
        """
        seconds: dict[Any, dict[str, Tensor]] = {}
        for key, geometry, _ in self._second_moments(document, groups, layouts, flattened=True):
            state = document["state"].get(key, {})
            if "exp_avg_sq" in state:
                seconds[key] = {"exp_avg_sq": widen(geometry, state["exp_avg_sq"], state.get("exp_avg_sq_col"))}
        widened = _with_moments(document, seconds)
        for key in seconds:
            widened["state"][key].pop("exp_avg_sq_col", None)  # one value per element has no column means
        firsts = {}
        for key, shard, parameter, (g, _) in self._stored_by_element(document, groups, layouts):
            if first := moment_forms.widened(shard, parameter, groups[g], document["state"].get(key, {})):
                firsts[key] = first
        return _with_moments(widened, firsts)

    def narrowed(
        self,
        document: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[AnyLayout]],
        *,
        convert: bool,
    ) -> dict[str, Any]:
        """Return a state dict in which moments of sharded parameters have the form that the optimizer stores.

        Args:
            document: a state dict in which second moments of flattened parameters have one value per element; not
                changed.
            groups: the optimizer's parameter groups.
            layouts: the layouts of their parameters, by group.
            convert: replace values that differ inside a block by the block's mean over all ranks that share it. All of
                these ranks must make this call.

        Raises:
            ValueError: values differ inside a block and ``convert`` is not set.
        """
        firsts = {
            key: moment_forms.narrowed(
                shard, parameter, groups[g], document["state"][key], sum(map(len, layouts[:g])) + i
            )
            for key, shard, parameter, (g, i) in self._stored_by_element(document, groups, layouts)
            if document["state"].get(key)
        }
        if firsts:
            document = {**document, "state": {**document["state"], **firsts}}
        seconds: dict[Any, dict[str, Tensor]] = {}
        works: dict[Any, Work] = {}
        for key, geometry, (g, i) in self._second_moments(document, groups, layouts, flattened=True):
            values = document["state"].get(key, {}).get("exp_avg_sq")
            means = convert or geometry.columns is not None  # row and column means are sums over ranks, too
            if means and (values is not None or geometry.cut is not None):
                # A rank without elements of a tensor has no state of it, but must still join the all-reduce.
                dtype = second_moment_dtype(groups[g]["params"][i])
                works[key] = Work(geometry, None if values is None else values.to(dtype).sqrt(), dtype)
            elif values is None:
                continue
            elif not is_blockwise(geometry, values):
                raise ValueError(
                    f"exp_avg_sq of {label(groups[g], g, i)} differs inside a block: it was kept for other blocks "
                    "(those of Adam and AdamW are one element each); pass convert=True on every rank, or use the rules "
                    "of the checkpoint"
                )
            else:
                seconds[key] = {"exp_avg_sq": narrow(geometry, values)}
        if convert:
            for key, geometry, (g, i) in self._second_moments(document, groups, layouts, flattened=False):
                values = document["state"].get(key, {}).get("exp_avg_sq")
                parameter = groups[g]["params"][i]
                same_placements = values is not None and getattr(values, "placements", None) == parameter.placements
                if same_placements and values.shape == parameter.shape:
                    works[key] = Work(geometry, local_of(values).sqrt(), values.dtype)
        for key, second in zip(works, second_moments(list(works.values())), strict=True):
            if works[key].grad is not None:
                seconds[key] = _wrapped(works[key].geometry, second)
        return _with_moments(document, seconds)

    def packed(
        self, groups: Sequence[dict[str, Any]], layouts: Sequence[list[AnyLayout]]
    ) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the shapes of quantised first moments of flat parameters, by the parameter's ``id``."""
        shapes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for g, group in enumerate(groups):
            for i, (parameter, layout) in enumerate(zip(group["params"], layouts[g], strict=True)):
                shard = self.of(g, i, group, layout) if isinstance(layout, FlatLayout) else None
                if shard is not None and shard.flat is not None and shard.flat.format is not None:
                    shapes[id(parameter)] = shard.flat.shapes
        return shapes

    def _stored_by_element(
        self, document: dict[str, Any], groups: Sequence[dict[str, Any]], layouts: Sequence[list[AnyLayout]]
    ) -> Iterator[tuple[Any, Shard | None, Tensor, Position]]:
        """Find the parameters of a state dict whose moments may be stored by element.

        Yields:
            (key of the state in the document, shard if it is one, parameter, position).
        """
        for flattened in (False, True):
            for key, _, (g, i) in self._second_moments(document, groups, layouts, flattened=flattened):
                yield key, self.of(g, i, groups[g], layouts[g][i]), groups[g]["params"][i], (g, i)

    def _second_moments(
        self,
        document: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[AnyLayout]],
        *,
        flattened: bool,
    ) -> Iterator[tuple[Any, Geometry, Position]]:
        """Find the sharded parameters of a state dict, with and without state.

        Args:
            document: a state dict.
            groups: the optimizer's parameter groups.
            layouts: the layouts of their parameters, by group.
            flattened: find flattened parameters; otherwise DTensors.

        Yields:
            (key of the parameter's state in the document, its geometry, its position in the optimizer).
        """
        positions = [(g, i) for g, group_layouts in enumerate(layouts) for i in range(len(group_layouts))]
        sharded = any(
            is_sharded(groups[g]["params"][i], layouts[g][i]) or saves_elements(groups[g]["params"][i])
            for g, i in positions
        )
        if not sharded or not isinstance(document.get("state"), Mapping) or "param_groups" not in document:
            return  # load_state_dict refuses a document that is no state dict
        keys = [key for saved in document["param_groups"] for key in saved["params"]]
        for (g, i), key in zip(positions, keys, strict=False):
            group, layout = groups[g], layouts[g][i]
            parameter = group["params"][i]
            # On a single rank such a parameter is not flattened, but must be saved in the form it has on several ranks.
            is_flat = isinstance(layout, FlatLayout) or saves_elements(parameter)
            if is_flat if flattened else is_dtensor(parameter):
                shard, shape = self.of(g, i, group, layout), tuple(parameter.shape)
                if shard is not None:
                    yield key, shard.geometry, (g, i)
                elif isinstance(layout, TensorLayout):
                    yield key, unsharded(layout, shape), (g, i)

    def begin(
        self,
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[AnyLayout]],
        states: Mapping[Tensor, Any],
        which: Iterable[int],
        only: int | None = None,
    ) -> StepView:
        """Check every parameter of a step and return the step's view of the groups. Nothing is stepped yet.

        Args:
            groups: the optimizer's parameter groups.
            layouts: the layouts of their parameters, by group.
            states: the state of every parameter that has one.
            which: positions of the groups to step.
            only: position of the only parameter to step within the group; None for all parameters.

        Raises:
            RuntimeError: ranks have different parameters, layouts or placements (checked before the first step and
                after a change), or a gradient does not fit its parameter. Nothing has been stepped.
            ValueError: a parameter cannot be stepped with its placements or options.
        """
        view = StepView(groups, layouts, states)
        try:
            for g in which:
                if any_sharded(groups[g]["params"], layouts[g]):
                    self._localise(view, g, groups[g], layouts[g], states, only)
            if self._must_agree:
                self._agree(groups, layouts)
                report_cut_rows(groups, layouts, self.of)
                self._must_agree = False
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
        """Replace the sharded parameters of one group by local tensors, in the view.

        Args:
            view: the step's view of the groups; changed.
            g: position of the group.
            group: the group.
            layouts: the layouts of its parameters.
            states: the state of every parameter that has one.
            only: position of the only parameter to step; None for all parameters.
        """
        params, local_layouts, local_states = list(group["params"]), cast(list[TensorLayout], list(layouts)), {}
        names = list(group.get("param_names") or [f"parameter {i}" for i in range(len(params))])
        places: list[Place | None] = [None] * len(params)
        seeds, free_seeds, position = [], [], 0
        for i, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
            shard = self.of(g, i, group, layout)
            own = [seed_of(g, position + k) for k in range(len(layout.ranges) if isinstance(layout, FlatLayout) else 1)]
            seeds.append(own[0] if own else 0)
            position += len(own)
            if shard is None:
                local_states[parameter] = states.get(parameter, {})
                continue
            shard.refresh()
            geometry = shard.geometry
            if group["differentiable"]:
                raise ValueError(f"{label(group, g, i)} is sharded; differentiable=True takes ordinary tensors only")
            params[i], places[i] = shard.view, shard.place
            if geometry.boxes:  # without boxes, no engine reads the layout
                local_layouts[i] = geometry.boxes[0].layout
            first = len(params)
            params += [free.view for free in shard.free]
            local_layouts += [box.layout for box in geometry.free]
            names += [f"a part of {names[i]}"] * len(shard.free)
            free_seeds += [own[0 if shard.flat is None else shard.flat.range_of(box)] for box in geometry.free]
            places += [free.place for free in shard.free]
            if only is not None and only != i:
                continue
            grad = shard.local_gradient(partial(label, group, g, i))
            state = shard.local_state(states.get(parameter) or {})
            if geometry.cut is not None:
                if grad is not None:
                    unfused = {**group, "fused": False}  # cut_update runs torch operations whatever ``fused`` says
                    whole = None if shard.place is None else shard.place.shape
                    require_takeable(shard.view, grad, state, unfused, label(group, g, i), whole=whole)
                view.cut[g, i] = (shard, grad)
                view.seeds[g, i] = own
                for k, free in enumerate(shard.free if grad is not None else ()):
                    view.free[g, first + k] = (i, free)
                    view.lend(free.view, free.gradient(grad))  # type: ignore[arg-type]
                    local_states[free.view] = free.state(state) if state else {}
            elif grad is not None and geometry.boxes:
                view.lend(shard.view, shard.gradient(grad))
                local_states[shard.view] = state
            elif grad is not None:
                view.empty.append((g, i))
        seeds += free_seeds
        view.groups[g] = {**group, "params": params, "param_names": names, PLACES: places, SEEDS: seeds}
        view.layouts[g], view.states[g] = local_layouts, local_states

    def _agree(self, groups: Sequence[Mapping[str, Any]], layouts: Sequence[list[AnyLayout]]) -> None:
        """Check that all ranks of every process group that shards a parameter have the same parameters.

        Raises:
            RuntimeError: ranks of a group have different parameters, layouts or placements.
        """
        facts: dict[tuple[int, ...], tuple[ProcessGroup, list[tuple[str, str]]]] = {}
        for g, group in enumerate(groups):
            for i, layout in enumerate(layouts[g]):
                shard = self.of(g, i, group, layout)
                for process_group in shard.geometry.sharding_groups if shard is not None else ():
                    entry = facts.setdefault(ranks_of(process_group), (process_group, []))
                    entry[1].append((label(group, g, i), shard.geometry.signature))  # type: ignore[union-attr]
        for ranks, (process_group, signatures) in facts.items():
            digest = hash(tuple(signatures))
            if self._agreed.get(ranks) != digest:
                require_agreement(process_group, signatures)
                self._agreed[ranks] = digest


def _wrapped(geometry: Geometry, second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return local second moments as the state stores them: as DTensors if the parameter is one."""
    out = {"exp_avg_sq": geometry.second_moment(second["exp_avg_sq"])}
    if geometry.columns is not None:
        out["exp_avg_sq_col"] = geometry.columns.second_moment(second["exp_avg_sq_col"])
    return out


def _with_moments(document: dict[str, Any], seconds: Mapping[Any, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return a copy of a state dict with the moments of some keys replaced."""
    if not seconds:
        return document
    states = dict(document["state"])
    states.update({key: {**states[key], **second} for key, second in seconds.items()})
    return {**document, "state": states}
