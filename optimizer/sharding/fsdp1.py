"""FullyShardedDataParallel (FSDP1): what its flat parameters hold, and a model as it was before it was flattened."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..partition.layout import Layout
from ..partition.names import clean
from ..partition.roles import Anatomy, whole_shape
from .flat import FlatLayout, Range, within

_STAMP = "_adam_mini_flat"


@dataclass(frozen=True)
class FlatFacts:
    """What a parameter that FSDP1 flattened and sharded holds.

    Attributes:
        names: of the tensors it holds ranges of: one under ``use_orig_params=True``.
        anatomies: of those tensors, whole.
        bounds: for each, [start, stop) of every rank.
        offsets: for each, where its elements begin in this rank's part.
        rank: this rank's place in the group.
        numel: elements of this rank's part.
        group: name of the process group that the parameter is dealt out over; empty for nobody else's.
        mixed: whether tensors were joined into one parameter.
    """

    names: tuple[str, ...]
    anatomies: tuple[Anatomy, ...]
    bounds: tuple[tuple[tuple[int, int], ...], ...]
    offsets: tuple[int, ...]
    rank: int
    numel: int
    group: str
    mixed: bool

    def layout(self, layout_of: Callable[[Anatomy, str], Layout], *, exempt: bool) -> FlatLayout:
        """Of the local part; ``exempt``: norms and biases that were joined with what decays do not decay."""
        ranges = tuple(
            Range(anatomy.shape, layout_of(anatomy, name), bounds, self.rank, offset,
                  anatomy.decays or not (exempt and self.mixed), name)
            for name, anatomy, bounds, offset in zip(self.names, self.anatomies, self.bounds, self.offsets, strict=True)
        )  # fmt: skip
        return FlatLayout(ranges, self.numel, self.group)


def facts_of(parameter: Tensor) -> FlatFacts | None:
    """What ``stamp`` left on a parameter."""
    facts = getattr(parameter, _STAMP, None)
    return facts if isinstance(facts, FlatFacts) and parameter.shape == (facts.numel,) else None


def stamp_bare(
    parameters: Sequence[tuple[Tensor, str]], anatomy_of: Callable[[Tensor, str, tuple[int, ...]], Anatomy]
) -> None:
    """``stamp`` for parameters whose model nobody gave: what they are comes from their tags or names.

    FSDP marks what it flattened, but a parameter does not lead back to the handle that knows its shape. The handles
    alive are looked through instead: once per optimizer built in this way.
    """
    bare = {id(p): name for p, name in parameters if getattr(p, "_fsdp_flattened", False) and facts_of(p) is None}
    bare |= {id(p): name for p, name in parameters if getattr(p, "_is_flat_param", False) and facts_of(p) is None}
    if not bare:
        return
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    for handle in [found for found in gc.get_objects() if type(found) is FlatParamHandle]:
        flat = handle.flat_param
        if id(flat) in bare:
            # The handle's names begin at the module that FSDP wrapped, the parameter's own at the model.
            where = clean(bare[id(flat)]).removesuffix("_flat_param")
            names = [where + fqn for fqn in flat._fqns]
        elif flat._params is not None and any(id(p) in bare for p in flat._params):
            names = [bare.get(id(p), fqn) for p, fqn in zip(flat._params, flat._fqns, strict=True)]
        else:
            continue
        own = flat._params or [flat] * len(names)
        shapes = [tuple(shape) for shape in flat._shapes]
        _stamp(handle, names, [anatomy_of(*one) for one in zip(own, names, shapes, strict=True)])


def handles(model: nn.Module) -> dict[str, Any]:
    """FSDP1's handles by the path of their module; empty where the model has none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return {}
    return {
        path: module._handle
        for path, module in model.named_modules()
        if isinstance(module, fsdp.FullyShardedDataParallel) and getattr(module, "_handle", None) is not None
    }


@contextlib.contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """For a while, what FSDP1 flattened or ZeRO-3 emptied is parameters with names and whole shapes, without data."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    missing = object()

    def put(holder: dict[str, Any], name: str, value: Any) -> None:
        changed.append((holder, name, holder.get(name, missing)))
        if value is missing:
            holder.pop(name, None)
        else:
            holder[name] = value

    try:
        for handle in handles(model).values():
            flat = handle.flat_param
            whole = {}
            for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
                tensor = torch.empty(shape, dtype=flat.dtype, device="meta")
                whole[info.module, info.param_name] = nn.Parameter(tensor, requires_grad=flat.requires_grad)
            for info in flat._shared_param_infos:
                whole[info.module, info.param_name] = whole[info.prim_module, info.prim_param_name]
            for (module, name), parameter in whole.items():
                put(module._parameters, name, parameter)
                put(module.__dict__, name, parameter)
            for module in model.modules():
                if module._parameters.get("_flat_param") is flat:
                    put(module._parameters, "_flat_param", missing)
        emptied: dict[Any, nn.Parameter] = {}
        for module in model.modules():
            for name, held in list(module._parameters.items()):
                if held is not None and hasattr(held, "ds_shape"):
                    if held not in emptied:  # tied weights stay one
                        tensor = torch.empty(whole_shape(held), dtype=held.dtype, device="meta")
                        emptied[held] = nn.Parameter(tensor, requires_grad=held.requires_grad)
                    put(module._parameters, name, emptied[held])
        yield
    finally:
        for holder, name, before in reversed(changed):
            if before is missing:
                holder.pop(name, None)
            else:
                holder[name] = before


def stamp(model: nn.Module, discover: Callable[[nn.Module], dict[str, Anatomy]]) -> None:
    """Leave on every parameter that FSDP1 sharded or flattened what it holds.

    Raises:
        ValueError: a tensor that was not contiguous when FSDP flattened it.
    """
    found = handles(model)
    if not found:
        return
    with whole_shapes(model):
        anatomies = discover(model)
        names = {id(p): name for name, p in model.named_parameters()}
        known = {
            path: [names[id(info.module._parameters[info.param_name])] for info in handle.flat_param._param_infos]
            for path, handle in found.items()
        }
    for path, handle in found.items():
        _stamp(handle, known[path], [anatomies[name] for name in known[path]])


def _stamp(handle: Any, names: list[str], anatomies: list[Anatomy]) -> None:
    flat = handle.flat_param
    for name, contiguous in zip(names, flat._contiguities, strict=True):
        if not contiguous:
            raise ValueError(f"{name!r} was not contiguous when FSDP flattened it; call .contiguous() on it before")
    offsets = [span for span, padding in zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
               if not padding]  # fmt: skip
    sharded = handle.uses_sharded_strategy
    size, world = flat._sharded_size.numel(), handle.world_size if sharded else 1
    rank = handle.rank if sharded else 0
    bounds = [tuple(within(first, last + 1, r * size, (r + 1) * size) for r in range(world)) for first, last in offsets]
    group = handle.process_group.group_name if sharded else ""
    starts = [max(first - rank * size, 0) for first, _ in offsets]
    if flat._params is None:
        facts = FlatFacts(tuple(names), tuple(anatomies), tuple(bounds), tuple(starts), rank, size, group, True)
        setattr(flat, _STAMP, facts)
        return
    if not sharded:
        return  # original parameters of original shapes: nothing to know
    for parameter, name, anatomy, bound in zip(flat._params, names, anatomies, bounds, strict=True):
        numel = bound[rank][1] - bound[rank][0]
        setattr(parameter, _STAMP, FlatFacts((name,), (anatomy,), (bound,), (0,), rank, numel, group, False))
