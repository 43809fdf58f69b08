"""FullyShardedDataParallel (FSDP1): which elements its flat parameters contain, and the model before flattening."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..interface import AnatomyOf, Discover, Wrapper, whole_shapes
from ..partition.names import clean
from ..partition.roles import Anatomy
from ..sharding.facts import FlatFacts, facts_of, leave_facts
from ..sharding.flat import within
from .replacing import MISSING, replacing

_ADVICE = "build the optimizer after wrapping with FSDP, and step outside summon_full_params"


class FSDP1(Wrapper):
    """torch.distributed.fsdp.FullyShardedDataParallel, with and without ``use_orig_params``."""

    @contextmanager
    def whole_shapes(self, model: nn.Module) -> Iterator[None]:
        """Open a context in which the original parameters replace flat ones, with whole shapes and without data."""
        with replacing() as put:
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
                        put(module._parameters, "_flat_param", MISSING)
            yield

    def saves_elements(self, parameter: Tensor) -> bool:
        """Return whether FSDP1 flattened the parameter. It saves elements even if one rank has all of them."""
        return bool(getattr(parameter, "_fsdp_flattened", False))

    def describe_model(self, model: nn.Module, discover: Discover) -> None:
        """Attach to every parameter that FSDP1 sharded or flattened a description of its elements.

        Raises:
            ValueError: a tensor was not contiguous when FSDP flattened it.
        """
        by_path = handles(model)
        if not by_path:
            return
        with whole_shapes(model):
            anatomies = discover(model)
            names = {id(p): name for name, p in model.named_parameters()}
            names_of = {
                path: [names[id(info.module._parameters[info.param_name])] for info in handle.flat_param._param_infos]
                for path, handle in by_path.items()
            }
        for path, handle in by_path.items():
            _describe(handle, names_of[path], [anatomies[name] for name in names_of[path]])

    def describe_parameters(self, parameters: Sequence[tuple[Tensor, str]], anatomy_of: AnatomyOf) -> None:
        """Attach the descriptions without the model; anatomies come from the parameters' tags or names.

        FSDP marks the parameters that it flattened, but a parameter has no reference to the handle with its shape.
        This method therefore searches all live handles, once for each optimizer that is built from parameters.
        """
        marks = ("_fsdp_flattened", "_is_flat_param")
        undescribed = {
            id(p): name
            for p, name in parameters
            if any(getattr(p, mark, False) for mark in marks) and facts_of(p) is None
        }
        if not undescribed:
            return
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        for handle in [x for x in gc.get_objects() if type(x) is FlatParamHandle]:
            flat = handle.flat_param
            if id(flat) in undescribed:
                # The handle's names begin at the module that FSDP wrapped, the parameter's name begins at the model.
                prefix = clean(undescribed[id(flat)]).removesuffix("_flat_param")
                names = [prefix + fqn for fqn in flat._fqns]
            elif flat._params is not None and any(id(p) in undescribed for p in flat._params):
                names = [undescribed.get(id(p), fqn) for p, fqn in zip(flat._params, flat._fqns, strict=True)]
            else:
                continue
            originals = flat._params or [flat] * len(names)
            shapes = [tuple(shape) for shape in flat._shapes]
            _describe(handle, names, [anatomy_of(*facts) for facts in zip(originals, names, shapes, strict=True)])


def handles(model: nn.Module) -> dict[str, Any]:
    """Return FSDP1's flat-parameter handles by the path of their module; empty if the model has none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return {}
    return {
        path: module._handle
        for path, module in model.named_modules()
        if isinstance(module, fsdp.FullyShardedDataParallel) and getattr(module, "_handle", None) is not None
    }


def _describe(handle: Any, names: list[str], anatomies: list[Anatomy]) -> None:
    """Attach descriptions to the parameters of a handle, whose tensors have these names and anatomies.

    Raises:
        ValueError: a tensor was not contiguous when FSDP flattened it.
    """
    flat = handle.flat_param
    for name, contiguous in zip(names, flat._contiguities, strict=True):
        if not contiguous:
            raise ValueError(f"{name!r} was not contiguous when FSDP flattened it; call .contiguous() on it before")
    spans = zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
    offsets = [span for span, padding in spans if not padding]  # (first, last) element of each tensor
    sharded = handle.uses_sharded_strategy
    size, world = flat._sharded_size.numel(), handle.world_size if sharded else 1
    rank = handle.rank if sharded else 0
    bounds = [tuple(within(first, last + 1, r * size, (r + 1) * size) for r in range(world)) for first, last in offsets]
    group = handle.process_group.group_name if sharded else ""
    starts = [max(first - rank * size, 0) for first, _ in offsets]
    if flat._params is None:
        facts = FlatFacts(
            tuple(names), tuple(anatomies), tuple(bounds), tuple(starts), rank, size, group, True, _ADVICE
        )
        leave_facts(flat, facts)
        return
    if not sharded:
        return  # the parameters have their original shapes, so they need no description
    for parameter, name, anatomy, bound in zip(flat._params, names, anatomies, bounds, strict=True):
        numel = bound[rank][1] - bound[rank][0]
        facts = FlatFacts((name,), (anatomy,), (bound,), (0,), rank, numel, group, False, _ADVICE)
        leave_facts(parameter, facts)
