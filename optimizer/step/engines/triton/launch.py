"""The launches of a step over lists of tensors, and the torch operator through which a compiler calls them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....partition.factored import FactoredLayout, TensorLayout
from .factored_tables import Matrix
from .tables import Dense, Tables, tables

_PLAIN = (Tensor, torch.nn.Parameter)
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_COUNTERS = 128  # counters per program of the first launch
_CAPTURED: list[Tensor] = []  # tables that captured CUDA graphs read at every replay, so they must not be freed
_LIBRARY = torch.library.Library("adam_mini", "FRAGMENT")
_LIBRARY.define(
    "triton_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] exp_avg_sq_cols, int[] layouts, int[] matrices, float[] numbers, "
    "Tensor?[] instead) -> ()"
)


@functools.lru_cache(maxsize=1)
def available() -> bool:
    """Whether Triton is installed, and there is a CUDA device or Triton interprets on the CPU (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    return _interpreted() or (torch.cuda.is_available() and torch.version.hip is None)


def accepts(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_sq_col: Tensor | None = None
) -> bool:
    """Whether the kernels support these tensors; see ``obstacle``."""
    return obstacle(param, grad, exp_avg, exp_avg_sq, exp_avg_sq_col) is None


def obstacle(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_sq_col: Tensor | None = None
) -> str | None:
    """Return in words what keeps the kernels from stepping these tensors, or None.

    They must be contiguous, fp32, bf16 or fp16, and begin at multiples of 16 bytes on one CUDA device; ``exp_avg_sq``
    and ``exp_avg_sq_col`` must be fp32. ``exp_avg_sq_col`` is None unless the second moment is factored.
    """
    names = ("parameter", "gradient", "exp_avg", "exp_avg_sq", "exp_avg_sq_col")
    wanted = "cpu" if _interpreted() else "cuda"
    for name, t in zip(names, (param, grad, exp_avg, exp_avg_sq, exp_avg_sq_col), strict=True):
        if t is None:
            continue
        if type(t) not in _PLAIN:
            return f"its {name} is a {type(t).__name__}, not a plain tensor"
        if t.device.type != wanted or t.device != param.device:
            return f"its {name} is on {t.device}, not on one {wanted} device with the others"
        if not t.is_contiguous():
            return f"its {name} has strides {t.stride()} and is not contiguous"
        if t.dtype not in (_TYPES if name in names[:3] else (torch.float32,)):
            return f"its {name} is {t.dtype}"
        if t.data_ptr() % 16:
            return f"its {name} does not begin at a multiple of 16 bytes"
    return None


def triton_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    layouts: Sequence[TensorLayout],
    *,
    exp_avg_sq_cols: Sequence[Tensor | None] | None = None,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float | Tensor,
    maximize: bool,
    capturable: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Take one Adam-mini step of every tensor, in place, and increment the step counters.

    Source: arXiv 2406.16793, Algorithm 1; the equations have the order of ``reference.reference_step``, or under a
    factored layout that of ``reference.factored_reference_step``. Arithmetic is fp32 and bias corrections are fp64;
    parameter and first moment are rounded once each.

    Args:
        params: parameters for which ``accepts`` is true; changed.
        grads: their gradients; not changed.
        exp_avgs: first moments, shapes of the parameters; changed.
        exp_avg_sqs: second moments, shapes ``layout.aligned_shape(param.shape)``, fp32; changed.
        steps: number of steps taken before this one, 0-dim fp32 each, on the device or the CPU; changed.
        layouts: the layout of each parameter.
        exp_avg_sq_cols: means of columns under a factored layout, shapes ``layout.columns_shape(param.shape)``, fp32;
            changed. None under any other layout; None instead of the sequence if no layout is factored.
        lr: learning rate; a one-element tensor on the device is read by the kernels, any other number by the host.
        beta1: decay rate of the first moment, in [0, 1); read like ``lr``.
        beta2: decay rate of the second moment, in [0, 1); read like ``lr``.
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: coefficient of the decoupled weight decay; read like ``lr``.
        maximize: whether to ascend the gradient instead of descending it.
        capturable: whether the host must not read from the device; counters on the CPU are then refused.
        grad_scale: the factor by which the gradients were multiplied, one element on the device; None for 1.
        found_inf: one element on the device; if it is nonzero, nothing is changed, counters included. None for 0.

    Raises:
        ValueError: ``capturable`` is true and a counter is on the CPU.
    """
    if capturable and any(t.device != p.device for t, p in zip(steps, params, strict=True)):
        raise ValueError("capturable=True, but step counters are not on their parameters' device; move them there")
    values = (lr, beta1, beta2, weight_decay)
    numbers = [0.0 if isinstance(x, Tensor) else float(x) for x in values] + [eps, -1.0 if maximize else 1.0]
    instead = [x if isinstance(x, Tensor) else None for x in values] + [grad_scale, found_inf]
    # The operator takes tensors with a factored second moment after all others.
    order = sorted(range(len(params)), key=lambda i: isinstance(layouts[i], FactoredLayout))
    lists = [[tensors[i] for i in order] for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)]
    columns = [c for c in exp_avg_sq_cols or () if c is not None]
    shapes: list[int] = []
    matrices: list[int] = []
    for layout, p in zip(layouts, params, strict=True):
        if isinstance(layout, FactoredLayout):
            matrices += Matrix.of(layout, p.shape).numbers()
        else:
            shapes += Dense.of(layout, p.shape).numbers()
    torch.ops.adam_mini.triton_update_(*lists, columns, shapes, matrices, numbers, instead)


def _operator(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    exp_avg_sq_cols: list[Tensor],
    layouts: list[int],
    matrices: list[int],
    numbers: list[float],
    instead: list[Tensor | None],
) -> None:
    """Implement the operator: launch the kernels once per combination of device and dtypes.

    Args:
        params: parameters, those with a factored second moment last; changed.
        grads: their gradients.
        exp_avgs: first moments; changed.
        exp_avg_sqs: second moments; changed.
        steps: step counters; changed.
        exp_avg_sq_cols: means of columns of the last parameters; changed.
        layouts: the layouts of the first parameters, each encoded by ``Dense.numbers``.
        matrices: the layouts of the last parameters, each encoded by ``Matrix.numbers``.
        numbers: lr, beta1, beta2, weight_decay, eps, and -1 to ascend the gradient, else 1.
        instead: tensors that replace the first four numbers, then grad_scale and found_inf; None where there is none.
    """
    on_host = any(t.device != p.device for t, p in zip(steps, params, strict=True))
    if on_host and instead[5] is not None:
        if float(instead[5]):
            return
        instead = [*instead[:5], None]
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, tensors in enumerate(zip(params, grads, exp_avgs, strict=True)):
        key = (tensors[0].device, *(t.dtype for t in tensors))
        groups[key].append(i)
    shapes = [*Dense.read(layouts), *Matrix.read(matrices)]
    means = [*[None] * (len(params) - len(exp_avg_sq_cols)), *exp_avg_sq_cols]
    for (device, *dtypes), members in groups.items():
        counters = [steps[i] for i in members]
        if on_host:
            counters = list(torch.tensor([float(t) for t in counters], device=device).unbind())
        columns = [[tensors[i] for i in members] for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
        work = _tables(tuple(shapes[i] for i in members), device)
        _launch([*columns, counters], [means[i] for i in members], work, dtypes, numbers, instead)
    if on_host:
        torch._foreach_add_(steps, 1)
    # Autograd does not see what the kernels write. With new versions, a backward pass that needs the old values fails
    # instead of using the new ones.
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *exp_avg_sq_cols])


_LIBRARY.impl("triton_update_", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("adam_mini::triton_update_", lambda *arguments: None, lib=_LIBRARY)


@functools.lru_cache(maxsize=64)
def _tables(layouts: tuple[Dense | Matrix, ...], device: torch.device) -> Tables:
    """Return the tables of these layouts, cached, because layouts rarely change between steps."""
    return tables(layouts, device)


def _launch(
    columns: list[list[Tensor]],
    means: list[Tensor | None],
    work: Tables,
    dtypes: Sequence[torch.dtype],
    numbers: Sequence[float],
    instead: Sequence[Tensor | None],
) -> None:
    """Launch the kernels for tensors of one device and one combination of dtypes, on the device's current stream.

    Args:
        columns: lists of parameters, gradients, first moments, second moments and step counters.
        means: the means of columns of each tensor; None if its second moment is not factored.
        work: the tables for their layouts.
        dtypes: dtypes of parameters, gradients and first moments.
        numbers: lr, beta1, beta2, weight_decay, eps, and -1 to ascend the gradient, else 1.
        instead: tensors that replace the first four numbers, then grad_scale and found_inf; None where there is none.
    """
    from . import factored_kernels, kernels  # these import triton

    device, count = columns[0][0].device, len(columns[0])
    rows = zip(*columns, means, strict=True)
    table = torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in rows])
    if bool((table[:, [0, 1, 2, 3, 5]] % 16).any()):
        raise ValueError("a tensor does not begin at a multiple of 16 bytes; call accepts() before triton_update()")
    addresses = _on_device(table, device)
    floats = torch.empty(2 * count + 6 + work.scratch, dtype=torch.float32, device=device)
    factors, shared, scratch = floats[: 2 * count], floats[2 * count : 2 * count + 6], floats[2 * count + 6 :]
    values = list(numbers)
    pointers: list[Tensor | None] = []
    for i, tensor in enumerate(instead):
        if tensor is not None and tensor.device != device:
            if i < 4:
                values[i], tensor = float(tensor), None
            else:
                tensor = tensor.to(device)
        pointers.append(tensor)
    types = [getattr(kernels.tl, _TYPES[dtype]) for dtype in dtypes]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED.extend(table for launch in work.launches for table in (launch.entries, launch.programs))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernels.prepare[(-(-count // _COUNTERS),)](addresses, factors, shared, count, *values, *pointers)
        for launch in work.launches:
            module = factored_kernels if launch.kernel.startswith("factored") else kernels
            getattr(module, launch.kernel)[(len(launch.programs),)](
                addresses,
                launch.entries,
                launch.programs,
                factors,
                shared,
                scratch,
                *types,
                launch.columns,
                launch.even,
            )


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy the table to the device without waiting for the copy."""
    if device.type != "cuda":
        return table.to(device)
    pinned = table.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(pinned)
    return pinned.to(device, non_blocking=True)


def _interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
