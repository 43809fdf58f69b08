"""The sharded parameters of one optimizer, as its step sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engines.checks import require_takeable
from ..groups import describe
from ..partition.layout import Layout
from ..state import moment_dtype, rounding_of
from ..update import second_moment_dtype
from .agreement import require_agreement
from .deepspeed import settle
from .exchange import destroyed, ranks_of, second_moments
from .flat import FlatLayout, flat_piece, is_blockwise, narrow, widen
from .kinds import is_dtensor, local_of
from .pieces import Part, Piece
from .shard import Shard
from .stepping import Position, Stepping

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

    def of(self, g: int, i: int, group: Mapping[str, Any], layout: Layout) -> Shard | None:
        """What is held of a parameter; None for an ordinary one."""
        parameter = group["params"][i]
        known = self._known.get((g, i))
        if known is not None and known.spec is not None and known.fits(parameter):
            return known
        if not is_sharded(parameter, layout):
            return None
        if known is None or not known.fits(parameter):
            known = self._known[g, i] = Shard(parameter, _piece(parameter, layout, describe(group, g, i)))
            self._fresh = True
        return known

    def new_state(self, shard: Shard, group: Mapping[str, Any]) -> dict[str, Any]:
        """State before the first step: DTensors where the parameter is one."""
        piece, view, parameter = shard.piece, shard.view, shard.parameter
        second = torch.zeros(piece.aligned, dtype=second_moment_dtype(view), device=view.device)
        beside = view.device if group["capturable"] or group["fused"] else "cpu"
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=beside),
            "exp_avg": torch.zeros_like(parameter, dtype=moment_dtype(parameter, group), requires_grad=False),
            "exp_avg_sq": piece.second_moment(second),
        }
        if rounding_of(parameter, group) == "kahan":
            state["compensation"] = torch.zeros_like(parameter, requires_grad=False)
        return state

    def settle(
        self, groups: Sequence[dict[str, Any]], layouts: Sequence[list[Layout]], states: Mapping[Tensor, Any]
    ) -> None:
        """Bring state that others wrote element by element into its own form."""
        steps: set[int] = set()
        for g, group in enumerate(groups):
            for i, parameter in enumerate(group["params"]):
                if state := states.get(parameter):
                    shard = self.of(g, i, group, layouts[g][i])
                    if shard is not None:
                        settle(state, shard.piece, moment_dtype(parameter, group), steps)

    def widened(
        self, document: dict[str, Any], groups: Sequence[dict[str, Any]], layouts: Sequence[list[Layout]]
    ) -> dict[str, Any]:
        """A state dict in which second moments of flattened parameters have one value per element."""
        return _changed(document, {
            key: widen(piece, document["state"][key]["exp_avg_sq"])
            for key, piece, _ in self._second_moments(document, groups, layouts, flattened=True)
            if "exp_avg_sq" in document["state"].get(key, {})
        })  # fmt: skip

    def narrowed(
        self,
        document: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[Layout]],
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
        works: dict[Any, tuple[Piece, Tensor | None, torch.dtype]] = {}
        for key, piece, (g, i) in self._second_moments(document, groups, layouts, flattened=True):
            values = document["state"].get(key, {}).get("exp_avg_sq")
            if convert and (values is not None or piece.cut is not None):
                # A rank that holds nothing of a tensor has no state of it, and takes part nevertheless.
                dtype = second_moment_dtype(groups[g]["params"][i])
                works[key] = piece, None if values is None else values.to(dtype).sqrt(), dtype
            elif values is None:
                continue
            elif not is_blockwise(piece, values):
                raise ValueError(
                    f"exp_avg_sq of {describe(groups[g], g, i)} differs inside a block: it was kept for other blocks "
                    "(Adam's and AdamW's are one element each); pass convert=True on every rank, or use the rules it "
                    "was kept under"
                )
            else:
                new[key] = narrow(piece, values)
        if convert:
            for key, piece, (g, i) in self._second_moments(document, groups, layouts, flattened=False):
                values = document["state"].get(key, {}).get("exp_avg_sq")
                parameter = groups[g]["params"][i]
                alike = values is not None and getattr(values, "placements", None) == parameter.placements
                if alike and values.shape == parameter.shape:
                    works[key] = piece, local_of(values).sqrt(), values.dtype
            for key, second in zip(works, second_moments(list(works.values())), strict=True):
                if works[key][1] is not None:
                    new[key] = works[key][0].second_moment(second)
        return _changed(document, new)

    def _second_moments(
        self,
        document: dict[str, Any],
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[Layout]],
        *,
        flattened: bool,
    ) -> Iterator[tuple[Any, Piece, Position]]:
        """Keys of a document's states of flattened parameters or else of DTensors, whether they are there or not."""
        places = [(g, i) for g, own in enumerate(layouts) for i in range(len(own))]
        sharded = any(is_sharded(groups[g]["params"][i], layouts[g][i]) or _was_flattened(groups[g]["params"][i])
                      for g, i in places)  # fmt: skip
        if not sharded or not isinstance(document.get("state"), Mapping) or "param_groups" not in document:
            return  # what is no state dict is refused elsewhere
        keys = [key for saved in document["param_groups"] for key in saved["params"]]
        for (g, i), key in zip(places, keys, strict=False):
            group, layout = groups[g], layouts[g][i]
            parameter = group["params"][i]
            # Where FSDP has nothing to shard (one rank) it must save what it saves on several.
            is_flat = isinstance(layout, FlatLayout) or _was_flattened(parameter)
            wanted = is_flat if flattened else is_dtensor(parameter)
            if wanted:
                shard, shape = self.of(g, i, group, layout), tuple(parameter.shape)
                piece = Piece(shape, (Part(layout),), layout.aligned_shape(shape)) if shard is None else shard.piece
                yield key, piece, (g, i)

    def begin(
        self,
        groups: Sequence[dict[str, Any]],
        layouts: Sequence[list[Layout]],
        states: Mapping[Tensor, Any],
        which: Iterable[int],
        only: int | None = None,
    ) -> Stepping:
        """Look at every parameter that takes part in a step.

        Raises:
            RuntimeError: ranks hold different things (asked before the first step, and after a change), or a gradient
                that does not fit; nothing has been stepped then.
            ValueError: a parameter that cannot be stepped as it is placed.
        """
        stepping = Stepping(groups, layouts, states)
        try:
            for g in which:
                if any(map(is_sharded, groups[g]["params"], layouts[g])):
                    self._localise(stepping, g, groups[g], layouts[g], states, only)
            if self._fresh:
                self._agree(groups, layouts)
                self._fresh = False
        except BaseException:
            stepping.end()
            raise
        return stepping

    def _localise(
        self,
        stepping: Stepping,
        g: int,
        group: dict[str, Any],
        layouts: list[Layout],
        states: Mapping[Tensor, Any],
        only: int | None,
    ) -> None:
        """Put local tensors in the place of the group's sharded parameters."""
        params, own_layouts, own_states = list(group["params"]), list(layouts), {}
        names = list(group.get("param_names") or [f"parameter {i}" for i in range(len(params))])
        unusual = isinstance(group["exp_avg_dtype"], str) or group["bf16_rounding"] or group["differentiable"]
        for i, (parameter, layout) in enumerate(zip(group["params"], layouts, strict=True)):
            shard = self.of(g, i, group, layout)
            if shard is None:
                own_states[parameter] = states.get(parameter, {})
                continue
            shard.refresh()
            piece = shard.piece
            if unusual:
                _require_options(parameter, piece, group, describe(group, g, i))
            params[i], own_layouts[i] = shard.view, piece.parts[0].layout if piece.parts else layout
            first = len(params)
            params += [free.view for free in shard.free]
            own_layouts += [part.layout for part in piece.free]
            names += [f"a part of {names[i]}"] * len(shard.free)
            if only is not None and only != i:
                continue
            grad = shard.local_gradient(partial(describe, group, g, i))
            state = shard.local_state(states.get(parameter) or {})
            if piece.cut is not None:
                if grad is not None:
                    plain = {**group, "fused": False}  # what ranks share is stepped in torch operations in any case
                    require_takeable(shard.view, grad, state, plain, describe(group, g, i))
                stepping.cut[g, i] = (shard, grad)
                for k, free in enumerate(shard.free if grad is not None else ()):
                    stepping.free[g, first + k] = (i, free)
                    stepping.lend(free.view, free.gradient(grad))  # type: ignore[arg-type]
                    own_states[free.view] = free.state(state) if state else {}
            elif grad is not None and piece.parts:
                stepping.lend(shard.view, shard.gradient(grad))
                own_states[shard.view] = state
            elif grad is not None:
                stepping.empty.append((g, i))
        stepping.groups[g] = {**group, "params": params, "param_names": names}
        stepping.layouts[g], stepping.states[g] = own_layouts, own_states

    def _agree(self, groups: Sequence[Mapping[str, Any]], layouts: Sequence[list[Layout]]) -> None:
        """Ask every group that shards something whether its ranks hold the same."""
        facts: dict[tuple[int, ...], tuple[ProcessGroup, list[tuple[str, str]]]] = {}
        for g, group in enumerate(groups):
            for i, layout in enumerate(layouts[g]):
                shard = self.of(g, i, group, layout)
                for process_group in shard.piece.sharding_groups if shard is not None else ():
                    entry = facts.setdefault(ranks_of(process_group), (process_group, []))
                    entry[1].append((describe(group, g, i), shard.piece.signature))  # type: ignore[union-attr]
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


def _was_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has the parameter in its hands, even where one rank has all of it."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_sharded(parameter: Tensor, layout: Layout) -> bool:
    """Whether a rank holds less of the parameter than its layout speaks of, or another form of it."""
    return is_dtensor(parameter) or isinstance(layout, FlatLayout)


def _require_options(parameter: Tensor, piece: Piece, group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for options that a sharded parameter cannot have."""
    if isinstance(group["exp_avg_dtype"], str):
        raise ValueError(
            f"{where} is sharded, and exp_avg_dtype={group['exp_avg_dtype']!r} keeps scales that do not reshard with "
            "it; use None, torch.float32 or torch.bfloat16"
        )
    if piece.cut is not None and rounding_of(parameter, group):
        raise ValueError(
            f"{where} shares blocks with other ranks, whose step does not round ({group['bf16_rounding']!r}); use "
            "bf16_rounding=None, or fp32 parameters with a mixed-precision policy"
        )
    if group["differentiable"]:
        raise ValueError(f"{where} is sharded; differentiable=True takes ordinary tensors only")


def _piece(parameter: Tensor, layout: Layout, where: str) -> Piece:
    if not isinstance(layout, FlatLayout):
        from .placed import placed_piece

        return placed_piece(parameter, layout, where)  # type: ignore[arg-type]
    if parameter.shape != (layout.numel,):
        raise ValueError(
            f"{where} has shape {tuple(parameter.shape)}, but FSDP or DeepSpeed gave this rank {layout.numel} elements "
            "of it; build the optimizer after wrapping with FSDP, and step outside summon_full_params"
        )
    if not layout.group:
        return flat_piece(layout.ranges, layout.numel, None, parameter.device, where)
    try:
        group = dist.distributed_c10d._resolve_process_group(layout.group)  # type: ignore[arg-type]
    except (RuntimeError, KeyError) as error:
        raise destroyed(f"the process group that {where} is sharded over") from error
    device = parameter.device
    if device.type not in {one.type for one in group._device_types}:  # offloaded: sent from where the group can
        device = group._device_types[0]
    return flat_piece(layout.ranges, layout.numel, group, device, where)
