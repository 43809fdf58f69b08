"""DeepSpeed: the flat tensors that it steps instead of an optimizer's parameters, and which elements they contain.

DeepSpeed's optimizers (ZeRO 1 to 3, with and without offload, the BF16 and the FP16 optimizer) wrap the optimizer, put
tensors of their own into its groups, and call ``step`` with one group, or one tensor of a group, at a time. They do not
inform the optimizer. When its groups no longer contain the parameters it was built from, this module searches for the
DeepSpeed optimizer that wraps it.
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
from ...partition.factored import TensorLayout
from ...partition.layout import AnyLayout
from ...sharding.flat import FlatLayout, Range, within
from ..replacing import replacing

_BASE = "deepspeed.runtime.base_optimizer"
_ADVICE = "build the optimizer anew and give it to deepspeed.initialize once"


@dataclass(frozen=True)
class Flat:
    """A tensor that DeepSpeed steps instead of parameters.

    Attributes:
        tensor: the tensor.
        layout: its layout.
        name: the name of its parameter, or the names of its first and last parameter.
    """

    tensor: Tensor
    layout: AnyLayout
    name: str


class Flattened:
    """All tensors that DeepSpeed steps instead of an optimizer's parameters; implements ``interface.Stand``."""

    def __init__(self, groups: list[list[Flat]]) -> None:
        self._groups = groups
        self._positions = {id(flat.tensor): (g, i) for g, flats in enumerate(groups) for i, flat in enumerate(flats)}

    @property
    def layouts(self) -> list[list[AnyLayout]]:
        """The layout of each tensor, by group."""
        return [[flat.layout for flat in flats] for flats in self._groups]

    @contextmanager
    def whole(self, optimizer: torch.optim.Optimizer) -> Iterator[Calls]:
        """Open a context in which the optimizer's groups contain all tensors.

        The context yields the updates of one ``step()``: those of the tensors that DeepSpeed had left in the groups.

        Raises:
            RuntimeError: a group contains a tensor that DeepSpeed did not make of this optimizer's parameters.
        """
        before = optimizer.param_groups
        homes = [self._home(group, g, len(before)) for g, group in enumerate(before)]
        view: list[dict[str, Any]] = [dict(optimizer.defaults) for _ in self._groups]
        for group, home in zip(before, homes, strict=True):
            if home is not None:
                view[home] = dict(group)
        for group, flats in zip(view, self._groups, strict=True):
            group |= {"params": [flat.tensor for flat in flats], "param_names": [flat.name for flat in flats]}
        optimizer.param_groups = view
        try:
            yield self._calls(before)
        finally:
            loaded = optimizer.param_groups
            optimizer.param_groups = before
            if loaded is not view:  # load_state_dict replaced the groups
                optimizer.param_groups = [
                    group if home is None else {**loaded[home], "params": group["params"]}
                    for group, home in zip(before, homes, strict=True)
                ]

    def _home(self, group: Mapping[str, Any], g: int, count: int) -> int | None:
        """Return the position of the group's tensors in ``_groups``; None for an empty group of unknown position.

        Between steps ZeRO-3 empties groups, but it keeps all of them in order.
        """
        if not group["params"]:
            return g if count == len(self._groups) else None
        return self._at(group["params"][0])[0]

    def _at(self, tensor: Tensor) -> tuple[int, int]:
        """Return the position of a tensor; raise RuntimeError if DeepSpeed did not make it."""
        if id(tensor) not in self._positions:
            raise RuntimeError(
                f"a parameter group holds a tensor of shape {tuple(tensor.shape)} that DeepSpeed did not make of this "
                f"optimizer's parameters; {_ADVICE}"
            )
        return self._positions[id(tensor)]

    def _calls(self, groups: Sequence[Mapping[str, Any]]) -> Calls:
        """Return the updates for the tensors in these groups: whole groups at once, or one tensor at a time."""
        present: dict[int, list[int]] = {}
        for group in groups:
            for tensor in group["params"]:
                g, i = self._at(tensor)
                present.setdefault(g, []).append(i)
        if all(len(indices) == len(self._groups[g]) for g, indices in present.items()):
            return [(tuple(present), None)]
        return [((g,), i) for g, indices in present.items() for i in indices]


def wrapper_of(optimizer: torch.optim.Optimizer) -> Any:
    """Return the DeepSpeed optimizer that wraps an optimizer; None if there is none."""
    base = sys.modules.get(_BASE)
    if base is None:
        return None
    kind = base.DeepSpeedOptimizer
    candidates = (x for x in gc.get_objects() if issubclass(type(x), kind))
    return next((x for x in candidates if vars(x).get("optimizer") is optimizer), None)


def flattened(optimizer: torch.optim.Optimizer, layout_of: LayoutOf) -> Flattened | None:
    """Return the tensors that DeepSpeed made of an optimizer's parameters; None if DeepSpeed does not wrap it.

    Args:
        optimizer: the optimizer that was passed to ``deepspeed.initialize``.
        layout_of: returns the layout of a whole parameter; None for a tensor that the optimizer was not built from.

    Raises:
        ValueError: DeepSpeed is configured for elastic checkpoints, which need state per element.
        RuntimeError: DeepSpeed steps parameters that the optimizer was not built from, or its optimizer is of an
            unknown kind.
    """
    wrapper = wrapper_of(optimizer)
    if wrapper is None:
        return None
    if getattr(wrapper, "elastic_checkpoint", False):
        raise ValueError(
            "zero_optimization.elastic_checkpoint=true cuts optimizer state by elements, but second moments have one "
            "value per block; leave it out, and use DeepSpeed's universal checkpoints to change the number of ranks"
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
        raise RuntimeError(f"{type(wrapper).__name__} is a DeepSpeed optimizer unknown to AdamMini; use ZeRO")
    groups = wrapper.real_dp_process_group
    joined = [[make.joined(params, starts and starts[g], flats[g], groups[g])] for g, params in enumerate(order)]
    return Flattened(joined)


def _stage3(wrapper: Any, make: _Maker) -> list[list[Flat]]:
    """Return the flat tensors of ZeRO 3, by group of the optimizer."""
    out: list[list[Flat]] = [[] for _ in wrapper.optimizer.param_groups]
    if len(out) <= max(wrapper.sub_group_to_group_id.values()):  # ZeRO has left only some groups in the optimizer
        out = [[] for _ in range(1 + max(wrapper.sub_group_to_group_id.values()))]
    for k, params in enumerate(wrapper.fp16_groups):
        process_groups = getattr(wrapper, "sub_group_process_groups", None)
        group = process_groups[k] if process_groups else wrapper.dp_process_group
        flat = make.partitioned(params, wrapper.fp32_partitioned_groups_flat[k], group)
        out[wrapper.sub_group_to_group_id[k]].append(flat)
    return out


class _Maker:
    """Builds ``Flat`` from DeepSpeed's tensors and the parameters in them.

    Args:
        names: name of each parameter.
        layout_of: returns the layout of a whole parameter; None for a tensor that the optimizer was not built from.
    """

    def __init__(self, names: Mapping[Tensor, str], layout_of: LayoutOf) -> None:
        self._names, self._of = names, layout_of

    def _layout_of(self, parameter: Tensor) -> TensorLayout:
        """Return a parameter's layout; raise RuntimeError if the optimizer was not built from the parameter."""
        layout = self._of(parameter)
        if layout is None:
            raise RuntimeError(
                f"DeepSpeed steps {self._names.get(parameter, 'a parameter')} of shape {whole_shape(parameter)}, which "
                "this optimizer was not built from; pass deepspeed.initialize the optimizer unchanged"
            )
        return layout

    def copy(self, parameter: Tensor, copied: Tensor) -> Flat:
        """Return the ``Flat`` of a parameter's copy in another dtype."""
        return Flat(copied, self._layout_of(parameter), self._names.get(parameter, ""))

    def joined(self, params: Sequence[Tensor], starts: Sequence[int] | None, flat: Tensor, group: Any) -> Flat:
        """Return the ``Flat`` of this rank's shard of all parameters joined (ZeRO 1 and 2, BF16).

        Args:
            params: the parameters, joined one after another and cut into equal shards.
            starts: first element of each parameter in the joined tensor; None if they follow without gaps.
            flat: this rank's shard.
            group: the process group.
        """
        size, rank = flat.numel(), dist.get_rank(group)
        ranges, offset = [], 0
        for i, parameter in enumerate(params):
            numel = prod(whole_shape(parameter))
            first = offset if starts is None else starts[i]
            bounds = tuple(
                within(first, first + numel, r * size, (r + 1) * size) for r in range(dist.get_world_size(group))
            )
            ranges.append(self._range(parameter, bounds, rank, max(first - rank * size, 0)))
            offset += numel
        return self._flat(params, ranges, flat, group)

    def partitioned(self, params: Sequence[Tensor], flat: Tensor, group: Any) -> Flat:
        """Return the ``Flat`` of this rank's shards of each parameter, joined (ZeRO 3).

        Args:
            params: the parameters, each cut into equal shards.
            flat: this rank's shards, one after another.
            group: the process group.
        """
        rank, ranges, offset = dist.get_rank(group), [], 0
        for parameter in params:
            numel = prod(whole_shape(parameter))
            size = parameter.partition_numel()  # type: ignore[attr-defined]  # a method that DeepSpeed adds
            bounds = tuple(within(0, numel, r * size, (r + 1) * size) for r in range(dist.get_world_size(group)))
            ranges.append(self._range(parameter, bounds, rank, offset))
            offset += size
        return self._flat(params, ranges, flat, group, offset)

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
    """DeepSpeed's ZeRO, BF16 and FP16 optimizers, which wrap AdamMini."""

    @contextmanager
    def whole_shapes(self, model: nn.Module) -> Iterator[None]:
        """Open a context in which parameters that ZeRO-3 emptied have whole shapes, without data."""
        whole: dict[Any, nn.Parameter] = {}
        with replacing() as put:
            for module in model.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None and hasattr(parameter, "ds_shape"):
                        if parameter not in whole:  # a tied weight must stay a single parameter
                            tensor = torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")
                            whole[parameter] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                        put(module._parameters, name, whole[parameter])
            yield

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """Return the shape that ZeRO-3 stores on an emptied parameter; None for any other parameter."""
        shape = getattr(parameter, "ds_shape", None)
        return None if shape is None else tuple(shape)

    def may_stand(self) -> bool:
        """Return whether DeepSpeed's optimizers were imported in this process."""
        return _BASE in sys.modules

    def stand_for(self, optimizer: torch.optim.Optimizer, layout_of: LayoutOf) -> Flattened | None:
        """Return the tensors that DeepSpeed steps instead of the optimizer's parameters; None if it steps those."""
        return flattened(optimizer, layout_of)
