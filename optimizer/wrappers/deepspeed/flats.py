"""DeepSpeed: the flat tensors it steps in place of an optimizer's parameters, and what they hold.

Its wrappers (ZeRO 1 to 3, with and without offload, the BF16 and the FP16 optimizer) put tensors of their own into the
optimizer's groups, and call ``step`` with one group, or one tensor of a group, at a time. Nobody tells the optimizer:
the wrapper that holds it is looked for when its groups are no longer what it was built from.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...interface import Calls, LayoutOf, Wrapper, whole_shape
from ...partition.layout import AnyLayout, Layout
from ...sharding.flat import FlatLayout, Range, within
from ..replacing import replacing

_BASE = "deepspeed.runtime.base_optimizer"
_ADVICE = "build the optimizer anew and give it to deepspeed.initialize once"


@dataclass(frozen=True)
class Flat:
    """A tensor that DeepSpeed steps in place of parameters."""

    tensor: Tensor
    layout: AnyLayout
    name: str


class Flattened:  # a ``Stand``
    """All tensors that stand for an optimizer's parameters, by group: the order never changes."""

    def __init__(self, groups: list[list[Flat]]) -> None:
        self._groups = groups
        self._place = {id(flat.tensor): (g, i) for g, own in enumerate(groups) for i, flat in enumerate(own)}

    @property
    def layouts(self) -> list[list[AnyLayout]]:
        """By group position."""
        return [[flat.layout for flat in own] for own in self._groups]

    @contextmanager
    def whole(self, optimizer: torch.optim.Optimizer) -> Iterator[Calls]:
        """While this is open, the optimizer's groups hold all tensors; yields which of them the wrapper had left there.

        Raises:
            RuntimeError: a group holds a tensor that the wrapper did not make.
        """
        before = optimizer.param_groups
        homes = [self._home(group, g, len(before)) for g, group in enumerate(before)]
        view: list[dict[str, Any]] = [dict(optimizer.defaults) for _ in self._groups]
        for group, home in zip(before, homes, strict=True):
            if home is not None:
                view[home] = dict(group)
        for group, own in zip(view, self._groups, strict=True):
            group |= {"params": [flat.tensor for flat in own], "param_names": [flat.name for flat in own]}
        optimizer.param_groups = view
        try:
            yield self._calls(before)
        finally:
            loaded = optimizer.param_groups
            optimizer.param_groups = before
            if loaded is not view:  # state was loaded, which makes new groups
                optimizer.param_groups = [
                    group if home is None else {**loaded[home], "params": group["params"]}
                    for group, home in zip(before, homes, strict=True)
                ]

    def _home(self, group: Mapping[str, Any], g: int, count: int) -> int | None:
        """Which of our groups this is; ZeRO-3 leaves groups empty between steps, but all of them and in order."""
        if not group["params"]:
            return g if count == len(self._groups) else None
        return self._at(group["params"][0])[0]

    def _at(self, tensor: Tensor) -> tuple[int, int]:
        if id(tensor) not in self._place:
            raise RuntimeError(
                f"a parameter group holds a tensor of shape {tuple(tensor.shape)} that DeepSpeed did not make of this "
                f"optimizer's parameters; {_ADVICE}"
            )
        return self._place[id(tensor)]

    def _calls(self, groups: Sequence[Mapping[str, Any]]) -> Calls:
        present: dict[int, list[int]] = {}
        for group in groups:
            for tensor in group["params"]:
                g, i = self._at(tensor)
                present.setdefault(g, []).append(i)
        if all(len(places) == len(self._groups[g]) for g, places in present.items()):
            return [(tuple(present), None)]
        return [((g,), i) for g, places in present.items() for i in places]


def wrapper_of(optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's optimizer around ours; None where there is none."""
    base = sys.modules.get(_BASE)
    if base is None:
        return None
    kind = base.DeepSpeedOptimizer
    held = (one for one in gc.get_objects() if issubclass(type(one), kind))
    return next((one for one in held if vars(one).get("optimizer") is optimizer), None)


def flattened(optimizer: torch.optim.Optimizer, layout_of: LayoutOf) -> Flattened | None:
    """What DeepSpeed made of an optimizer's parameters; None where no wrapper of its holds the optimizer.

    Args:
        optimizer: as it was given to ``deepspeed.initialize``.
        layout_of: the layout of a parameter that the optimizer was built from, whole; None for another tensor.

    Raises:
        ValueError: the wrapper keeps checkpoints in a form that blocks do not have.
        RuntimeError: the wrapper holds parameters that the optimizer was not built from, or is one we do not know.
    """
    wrapper = wrapper_of(optimizer)
    if wrapper is None:
        return None
    if getattr(wrapper, "elastic_checkpoint", False):
        raise ValueError(
            "zero_optimization.elastic_checkpoint=true cuts optimizer state by elements, which shared second moments "
            "do not have; leave it out, and use DeepSpeed's universal checkpoints to change the number of ranks"
        )
    make = _Maker(getattr(wrapper, "param_names", None) or {}, layout_of)
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return Flattened(_stage3(wrapper, make))
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        order, flats = wrapper.round_robin_bit16_groups, wrapper.single_partition_of_fp32_groups
        starts = getattr(wrapper, "round_robin_bit16_offsets", None)
    elif hasattr(wrapper, "fp32_groups_flat_partition"):
        order, flats, starts = wrapper.bf16_groups, wrapper.fp32_groups_flat_partition, None
    elif hasattr(wrapper, "fp32_groups"):  # a copy of each parameter in fp32
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return Flattened([[make.copy(p, q) for p, q in zip(ps, qs, strict=True)] for ps, qs in pairs])
    else:
        raise RuntimeError(f"{type(wrapper).__name__} is a DeepSpeed optimizer that AdamMini does not know; use ZeRO")
    groups = wrapper.real_dp_process_group
    return Flattened([
        [make.joined(params, starts and starts[g], flats[g], groups[g])] for g, params in enumerate(order)
    ])  # fmt: skip


def _stage3(wrapper: Any, make: _Maker) -> list[list[Flat]]:
    out: list[list[Flat]] = [[] for _ in wrapper.optimizer.param_groups]
    if len(out) <= max(wrapper.sub_group_to_group_id.values()):  # one of its groups at a time
        out = [[] for _ in range(1 + max(wrapper.sub_group_to_group_id.values()))]
    for k, params in enumerate(wrapper.fp16_groups):
        own = getattr(wrapper, "sub_group_process_groups", None)
        group = own[k] if own else wrapper.dp_process_group
        out[wrapper.sub_group_to_group_id[k]].append(make.dealt(params, wrapper.fp32_partitioned_groups_flat[k], group))
    return out


class _Maker:
    """From a wrapper's tensors and the parameters in them to what they hold."""

    def __init__(self, names: Mapping[Tensor, str], layout_of: LayoutOf) -> None:
        self._names, self._of = names, layout_of

    def _layout_of(self, parameter: Tensor) -> Layout:
        layout = self._of(parameter)
        if layout is None:
            raise RuntimeError(
                f"DeepSpeed steps {self._names.get(parameter, 'a parameter')} of shape {whole_shape(parameter)}, which "
                "this optimizer was not built from; give deepspeed.initialize the optimizer as it was built"
            )
        return layout

    def copy(self, parameter: Tensor, copied: Tensor) -> Flat:
        """A parameter's copy in another dtype."""
        return Flat(copied, self._layout_of(parameter), self._names.get(parameter, ""))

    def joined(self, params: Sequence[Tensor], starts: Sequence[int] | None, flat: Tensor, group: Any) -> Flat:
        """This rank's of the equal parts of all parameters, one behind the other (ZeRO 1 and 2, BF16)."""
        size, rank = flat.numel(), dist.get_rank(group)
        ranges, at = [], 0
        for i, parameter in enumerate(params):
            numel = prod(whole_shape(parameter))
            first = at if starts is None else starts[i]
            bounds = tuple(
                within(first, first + numel, r * size, (r + 1) * size) for r in range(dist.get_world_size(group))
            )
            ranges.append(self._range(parameter, bounds, rank, max(first - rank * size, 0)))
            at += numel
        return self._flat(params, ranges, flat, group)

    def dealt(self, params: Sequence[Tensor], flat: Tensor, group: Any) -> Flat:
        """This rank's of the equal parts of each parameter, one behind the other (ZeRO 3)."""
        rank, ranges, at = dist.get_rank(group), [], 0
        for parameter in params:
            # DeepSpeed gives its parameters this method.
            numel, part = prod(whole_shape(parameter)), parameter.partition_numel()  # type: ignore[attr-defined]
            bounds = tuple(within(0, numel, r * part, (r + 1) * part) for r in range(dist.get_world_size(group)))
            ranges.append(self._range(parameter, bounds, rank, at))
            at += part
        return self._flat(params, ranges, flat, group, at)

    def _range(self, parameter: Tensor, bounds: tuple[tuple[int, int], ...], rank: int, offset: int) -> Range:
        name = self._names.get(parameter, "")
        return Range(whole_shape(parameter), self._layout_of(parameter), bounds, rank, offset, name=name)

    def _flat(
        self, params: Sequence[Tensor], ranges: list[Range], flat: Tensor, group: Any, numel: int | None = None
    ) -> Flat:
        first, last = (self._names.get(p, "unnamed") for p in (params[0], params[-1]))
        layout = FlatLayout(tuple(ranges), flat.numel() if numel is None else numel, group.group_name, _ADVICE)
        return Flat(flat, layout, first if len(params) == 1 else f"{first} to {last}")


class DeepSpeed(Wrapper):
    """DeepSpeed's ZeRO, BF16 and FP16 optimizers around this one."""

    @contextmanager
    def whole_shapes(self, model: nn.Module) -> Iterator[None]:
        """Parameters that ZeRO-3 emptied, with whole shapes and without data."""
        emptied: dict[Any, nn.Parameter] = {}
        with replacing() as put:
            for module in model.modules():
                for name, held in list(module._parameters.items()):
                    if held is not None and hasattr(held, "ds_shape"):
                        if held not in emptied:  # tied weights stay one
                            tensor = torch.empty(whole_shape(held), dtype=held.dtype, device="meta")
                            emptied[held] = nn.Parameter(tensor, requires_grad=held.requires_grad)
                        put(module._parameters, name, emptied[held])
            yield

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """ZeRO-3 keeps the shape beside the empty tensor."""
        shape = getattr(parameter, "ds_shape", None)
        return None if shape is None else tuple(shape)

    def may_stand(self) -> bool:
        """Whether anything of DeepSpeed can hold optimizers in this process."""
        return _BASE in sys.modules

    def stand_for(self, optimizer: torch.optim.Optimizer, layout_of: LayoutOf) -> Flattened | None:
        """The flat tensors of the wrapper that holds the optimizer."""
        return flattened(optimizer, layout_of)
