"""FullyShardedDataParallel (FSDP1): what its flat parameters hold, and a model as it was before it was flattened."""

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
        """Parameters with names and whole shapes, without data, instead of flat ones."""
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
        """FSDP1 does so also where one rank holds all."""
        return bool(getattr(parameter, "_fsdp_flattened", False))

    def describe_model(self, model: nn.Module, discover: Discover) -> None:
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
            _describe(handle, known[path], [anatomies[name] for name in known[path]])

    def describe_parameters(self, parameters: Sequence[tuple[Tensor, str]], anatomy_of: AnatomyOf) -> None:
        """The same for parameters whose model is not at hand: what they are comes from their tags or names.

        FSDP marks what it flattened, but a parameter does not lead back to the handle that knows its shape. The
        handles alive are looked through instead: once per optimizer built in this way.
        """
        marks = ("_fsdp_flattened", "_is_flat_param")
        bare = {
            id(p): name
            for p, name in parameters
            if any(getattr(p, mark, False) for mark in marks) and facts_of(p) is None
        }
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
            _describe(handle, names, [anatomy_of(*one) for one in zip(own, names, shapes, strict=True)])


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


def _describe(handle: Any, names: list[str], anatomies: list[Anatomy]) -> None:
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
        facts = FlatFacts(
            tuple(names), tuple(anatomies), tuple(bounds), tuple(starts), rank, size, group, True, _ADVICE
        )
        leave_facts(flat, facts)
        return
    if not sharded:
        return  # original parameters of original shapes: nothing to know
    for parameter, name, anatomy, bound in zip(flat._params, names, anatomies, bounds, strict=True):
        numel = bound[rank][1] - bound[rank][0]
        facts = FlatFacts((name,), (anatomy,), (bound,), (0,), rank, numel, group, False, _ADVICE)
        leave_facts(parameter, facts)
