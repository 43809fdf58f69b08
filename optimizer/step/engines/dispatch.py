"""The choice of an engine for each tensor of a step; all tensors are checked before any tensor is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...partition.factored import FactoredLayout, TensorLayout
from ..dtypes import rounding_of
from ..factored import factored_update
from ..hyper import Hyper
from ..labels import label
from ..moments import format_of
from ..places import Place
from ..update import adam_mini_update
from . import native, triton
from .checks import require_takeable
from .foreach import foreach_update
from .rounded import rounded_update
from .traced import traced_update

PLACES, SEEDS = "places", "seeds"
"""Keys of a step's view of a group with shards: each tensor's ``Place`` or None, and each tensor's seed."""


class Item(NamedTuple):
    """One tensor of a step.

    Attributes:
        position: index in the group's list of parameters.
        seed: seed of the tensor's random rounding, uint32.
        param: parameter.
        grad: its gradient.
        state: the parameter's optimizer state.
        layout: the layout of the parameter.
        place: where the parameter lies in the whole one, if it is a shard.
    """

    position: int
    seed: int
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    layout: TensorLayout
    place: Place | None = None


@dataclass
class Work:
    """One group's part of a step, checked and ready to run.

    Attributes:
        g: index of the group.
        group: the parameter group.
        layouts: the layouts of the group's parameters.
        batches: tensors whose addresses and layouts are unchanged since the last step, so the native call can be
            repeated.
        others: positions in the group of all other parameters that have a gradient.
    """

    g: int
    group: dict[str, Any]
    layouts: list[TensorLayout]
    batches: native.Batches
    others: list[int]


class Engines:
    """The engines of one optimizer, with the records of its tensors that the native loop reuses from step to step."""

    def __init__(self) -> None:
        self._ready: dict[int, list[native.Ready | None]] = {}  # group index -> a record per parameter
        self._batches: dict[int, native.Batches] = {}  # group index -> tensors of the last native call
        self._choosers: defaultdict[int, native.Chooser] = defaultdict(native.Chooser)  # group index -> its way

    def forget(self) -> None:
        """Drop all records, because layouts or state were replaced."""
        self._ready.clear()
        self._batches.clear()
        self._choosers.clear()

    def prepare(
        self,
        g: int,
        group: dict[str, Any],
        layouts: list[TensorLayout],
        states: Mapping[Tensor, Any],
        only: Sequence[int] | None = None,
    ) -> Work:
        """Check the parameters of one group that have a gradient, without changing any tensor.

        Args:
            g: index of the group.
            group: the parameter group.
            layouts: the layouts of the group's parameters.
            states: the state of each parameter.
            only: positions of the parameters to step; None for all of the group.

        Returns:
            The group's part of the step, for ``step``.

        Raises:
            RuntimeError: no engine supports a tensor (``checks.require_takeable``).
            ValueError: a parameter's shape does not match its layout.
            AssertionError: the flags are a combination that torch refuses at a step.
        """
        parameters = group["params"]
        ready = self._ready.setdefault(g, [])
        ready += [None] * (len(layouts) - len(ready))  # sharding after the first step may add layouts
        if group["foreach"] and group["differentiable"]:
            raise AssertionError("foreach=True keeps no graph; use foreach=None with differentiable=True")
        usable = _may_fuse(group) and native.available()
        last = self._batches.get(g) if usable and only is None else None
        if last is not None and last.matches(parameters, [p.grad for p in parameters], states):
            work, rest = Work(g, group, layouts, last, []), last.others
        else:
            chooser = self._choosers[g] if only is None else None
            work, rest = Work(g, group, layouts, native.Batches(len(layouts), chooser), []), list(range(len(layouts)))
            if only is None:
                self._batches[g] = work.batches
        for i in rest if only is None else only:
            parameter = parameters[i]
            grad = parameter.grad
            if grad is None:
                continue
            record = ready[i]
            if usable and record is not None and record.matches(parameter, grad, states.get(parameter, {})):
                work.batches.add(record, parameter, grad, i)
                continue
            where = label(group, g, i)
            layouts[i].require(parameter.shape, where)
            place = group[PLACES][i] if PLACES in group else None
            whole = None if place is None else place.shape
            require_takeable(parameter, grad, states.get(parameter) or {}, group, where, layouts[i], whole)
            work.others.append(i)
        return work

    def step(self, work: Work, hyper: Hyper, state_of: Callable[[int, int], dict[str, Any]]) -> None:
        """Take the step of a group that ``prepare`` checked.

        Args:
            work: the result of ``prepare``.
            hyper: the group's hyper-parameters.
            state_of: called with (g, i); returns a parameter's state and creates it if there is none.
        """
        params = work.group["params"]
        seeds, places = work.group.get(SEEDS), work.group.get(PLACES)
        items = [
            Item(
                position=i,
                seed=seed_of(work.g, i) if seeds is None else seeds[i],
                param=params[i],
                grad=params[i].grad,
                state=state_of(work.g, i),
                layout=work.layouts[i],
                place=None if places is None else places[i],
            )
            for i in work.others
        ]
        ready = self._ready[work.g]
        for i, record in zip(work.others, run(items, work.group, hyper, work.batches), strict=True):
            ready[i] = record


def run(
    items: Sequence[Item], group: Mapping[str, Any], hyper: Hyper, batches: native.Batches | None = None
) -> list[native.Ready | None]:
    """Step tensors of one group that have been checked, and the tensors that are already in ``batches``.

    Args:
        items: the tensors to dispatch to engines.
        group: the options of the group.
        hyper: the group's hyper-parameters.
        batches: tensors of a repeated native call; the items that the native loop can step are added. None if there
            are no such tensors.

    Returns:
        For each item, the record with which the native call can be repeated, or None if another engine stepped it.
    """
    batches = native.Batches(len(items)) if batches is None else batches
    usable = _may_fuse(group) and native.available()
    records = [_prepared(item, group) if usable else None for item in items]
    if usable:
        items = _with_dense_gradients(items, records, group)
    listed, on_cuda = [], []
    for item, record in zip(items, records, strict=True):
        if record is not None:
            batches.add(record, item.param, item.grad, item.position)
        elif _rounds(item, group):
            _eager(item, group, hyper)
        elif _may_fuse(group) and triton.available() and _fits_triton(item):
            on_cuda.append(item)
        elif isinstance(item.layout, FactoredLayout):
            # Its means are reductions of one tensor, so a list of tensors would take as many operations.
            _alone(item, group, hyper)
        elif _uses_foreach(group, item.param):
            listed.append(item)
        else:
            _alone(item, group, hyper)
    for update, tensors in ((triton.triton_update, on_cuda), (foreach_update, listed)):
        if tensors:
            _step_lists(update, tensors, hyper, capturable=group["capturable"])
    if len(batches):
        scale = 1.0 if hyper.grad_scale is None else float(hyper.grad_scale)
        batches.step(**hyper.numbers(), grad_scale=scale)
    return records


def seed_of(g: int, i: int) -> int:
    """Return the seed of a tensor's random rounding, uint32.

    It depends only on the group's index and the position in the group, so that a run can be repeated and resumed.
    """
    return (g * 0x9E3779B1 + i * 0x85EBCA77) & 0xFFFFFFFF


def _prepared(item: Item, group: Mapping[str, Any]) -> native.Ready | None:
    """Return the native loop's record of the item, or None if the loop does not support its tensors."""
    rounding = rounding_of(item.param, group)
    if item.place is None:
        return native.prepare(item.param, item.grad, item.state, item.layout, seed=item.seed, rounding=rounding)
    size = format_of(item.state["exp_avg"]).block if "exp_avg_scale" in item.state else 1
    random = "exp_avg_scale" in item.state or rounding == "stochastic"
    streams = item.place.streams(item.seed, size) if random else (0, 0)
    if streams is None:
        return None
    return native.prepare(item.param, item.grad, item.state, item.layout, streams=streams, rounding=rounding)


def _with_dense_gradients(
    items: Sequence[Item], records: list[native.Ready | None], group: Mapping[str, Any]
) -> list[Item]:
    """Copy the gradients of factored tensors for which the native loop needs them dense, and complete the records.

    Args:
        items: the tensors to dispatch.
        records: their records, None where the loop does not support an item; changed.
        group: the options of the group.
    """
    out = list(items)
    for k, (item, record) in enumerate(zip(items, records, strict=True)):
        param, grad, layout = item.param, item.grad, item.layout
        if record is not None or not isinstance(layout, FactoredLayout) or grad.stride() == param.stride():
            continue
        if native.obstacle(param, grad, item.state, layout=layout, rounding=rounding_of(param, group)) is None:
            dense = item._replace(grad=native.dense_gradient(param, grad))
            records[k] = _prepared(dense, group)
            out[k] = dense if records[k] is not None else item
    return out


def _may_fuse(group: Mapping[str, Any]) -> bool:
    """Whether the flags allow a fused engine; as in torch, setting ``foreach`` excludes one unless ``fused=True``."""
    return not group["differentiable"] and (group["fused"] or (group["fused"] is None and group["foreach"] is None))


def _uses_foreach(group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether the foreach engine steps the parameter: on request, or by default on CUDA, where launches are costly."""
    default = group["foreach"] is None and group["fused"] is None and parameter.device.type == "cuda"
    return (group["foreach"] or default) and not group["differentiable"]


def _alone(item: Item, group: Mapping[str, Any], hyper: Hyper) -> None:
    """Step one tensor with torch operations: on the device alone if autograd or a captured graph needs that."""
    if not group["differentiable"] and not group["capturable"]:
        _eager(item, group, hyper)
    elif group["capturable"] or not hyper.skips():  # a skipped step would give autograd NaNs; a capture cannot ask
        _traced(item, hyper, differentiable=group["differentiable"])


def _traced(item: Item, hyper: Hyper, *, differentiable: bool) -> None:
    """Step one tensor with the traced engine."""
    param, grad, state, layout = item[2:6]
    traced_update(
        param,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["step"],
        layout,
        hyper,
        exp_avg_sq_col=state.get("exp_avg_sq_col"),
        differentiable=differentiable,
    )


def _rounds(item: Item, group: Mapping[str, Any]) -> bool:
    """Whether the step includes a special rounding, which only the native loop and ``rounded_update`` implement."""
    return "exp_avg_scale" in item.state or rounding_of(item.param, group) is not None


def _eager(item: Item, group: Mapping[str, Any], hyper: Hyper) -> None:
    """Step one tensor with the eager engine, or with ``rounded_update`` if the step includes a special rounding."""
    if hyper.skips():
        return
    param, grad, state, layout = item[2:6]
    if hyper.grad_scale is not None:
        grad = grad / hyper.grad_scale
    state["step"] += 1
    if _rounds(item, group):
        rounding = rounding_of(param, group)
        rounded_update(param, grad, state, layout, hyper, seed=item.seed, rounding=rounding, place=item.place)
        return
    first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
    numbers = hyper.numbers() | {"lr": hyper.lr}
    if isinstance(layout, FactoredLayout):
        columns = state["exp_avg_sq_col"]
        factored_update(param, grad, first, second, columns, layout, step=step, **numbers)
    else:
        adam_mini_update(param, grad, first, second, layout, step=step, **numbers)


def _fits_triton(item: Item) -> bool:
    """Whether the Triton kernels support the item's tensors."""
    state = item.state
    return triton.accepts(item.param, item.grad, state["exp_avg"], state["exp_avg_sq"], state.get("exp_avg_sq_col"))


def _step_lists(update: Callable[..., None], tensors: Sequence[Item], hyper: Hyper, *, capturable: bool) -> None:
    """Call an engine that steps lists of tensors."""
    params, grads, states, layouts = (list(column) for column in list(zip(*tensors, strict=True))[2:6])
    first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    columns = [state.get("exp_avg_sq_col") for state in states]
    factored = {} if all(c is None for c in columns) else {"exp_avg_sq_cols": columns}
    update(
        params,
        grads,
        first,
        second,
        steps,
        layouts,
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        maximize=hyper.maximize,
        capturable=capturable,
        grad_scale=hyper.grad_scale,
        found_inf=hyper.found_inf,
        **factored,
    )
