"""The step over lists of tensors, with torch's own foreach operations.

Tensors are sorted into buckets, each of which one foreach call can process, and a bucket is processed in chunks. A
chunk consists of several tensors, or of one slice of a large tensor, so that its temporaries are bounded. Operations on
tensors of a layout's aligned shape are batched. The reductions are one call per slice, because torch has no foreach
reduction over some of the axes. On a CPU, torch's foreach is a loop in C++. On CUDA, torch needs equal shapes to
process many tensors in one launch. A scale that broadcasts against the parameter has another shape, so under a layout
that shares second moments the update is one launch per tensor.

Temporaries: two tensors of the aligned shape. In slices, also fp32 copies of the parameter, gradient and moment if they
are bf16 or fp16 or their dtypes differ, and a copy of the gradient with ``maximize``, ``grad_scale`` or ``found_inf``.
An aligned shape cannot be sliced if its blocks cross axis 0 (columns) or differ in length along axis 0.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...partition.layout import Layout, Runs
from ..hyper import corrections
from ..update import block_mean_square

_WIDE = {torch.float32, torch.float64}
# Elements of a chunk: on a CPU _SMALLEST, because temporaries of a larger chunk leave the cache, elsewhere at least
# 1 / _SHARE of all elements. Temporaries need 16 bytes per element, which is 5 % of the bytes of p, g and m in bf16.
_SMALLEST, _SHARE = 1 << 16, 64


def foreach_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    layouts: Sequence[Layout],
    *,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    weight_decay: float | Tensor,
    maximize: bool,
    capturable: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Take one Adam-mini step of every tensor, in place, and increment the step counters.

    Source: arXiv 2406.16793, Algorithm 1; the equations have the order of ``reference.reference_step``.

    Args:
        params: parameters, any strides, floating-point dtypes and devices; changed.
        grads: their gradients, same shapes and devices, any strides, also expanded; not changed.
        exp_avgs: first moments, shapes of the parameters; changed.
        exp_avg_sqs: second moments, shapes ``layout.aligned_shape(param.shape)``, fp32 or float64; changed.
        steps: number of steps taken before this one, 0-dim fp32 each; changed.
        layouts: the blocks of each parameter.
        lr: learning rate; a 0-dim tensor is read on the host unless ``capturable``.
        beta1: decay rate of the first moment, in [0, 1); a 0-dim tensor is read on the host unless ``capturable``.
        beta2: decay rate of the second moment, in [0, 1); a 0-dim tensor is read on the host unless ``capturable``.
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: coefficient of the decoupled weight decay; a 0-dim tensor is read on the host unless
            ``capturable``.
        maximize: whether to ascend the gradient instead of descending it.
        capturable: keep all numbers on the device; the counters must be there too. ``torch.compile`` implies this.
        grad_scale: the factor by which the gradients were multiplied, one element; None for 1.
        found_inf: one element; if it is nonzero, nothing is changed, counters included. None for 0.
        chunk: number of elements of the temporaries that exist at a time. None chooses a number that keeps the
            temporaries under 5 % of a group that has 4M elements or more. Under ``torch.compile``, which fuses the
            temporaries, None does not cut tensors.
    """
    on_device = capturable or torch.compiler.is_compiling()
    numbers = _Numbers(lr, beta1, beta2, eps, weight_decay, -1.0 if maximize else 1.0, grad_scale, found_inf)
    if not on_device:
        if found_inf is not None and float(found_inf):
            return
        numbers = numbers.read()
    elements = sum(p.numel() for p in params)
    for members in _buckets(params, grads, exp_avgs).values():
        device = params[members[0]].device
        local = numbers.on(device)
        counters = [steps[i] for i in members]
        # A skipped step is not counted. The increment is computed on the device, so that the host need not wait.
        torch._foreach_add_(counters, 1 if local.skip is None else torch.where(local.skip, 0.0, 1.0))
        sizes, roots = _corrections(counters, local, on_device)
        dtypes = {tensors[members[0]].dtype for tensors in (params, grads, exp_avgs)}
        copies = local.changes_gradients or len(dtypes) > 1 or not dtypes <= _WIDE
        work = [
            _Slice(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], layouts[i], size, root, copies)
            for i, size, root in zip(members, sizes, roots, strict=True)
            if params[i].numel()
        ]
        limit = chunk or _limit(device, elements)
        for slices in _chunks(work, limit):
            _step(slices, local, limit)


def _limit(device: torch.device, elements: int) -> int:
    """Return how many elements the temporaries of a chunk may have; ``elements`` is the size of the group."""
    if torch.compiler.is_compiling():
        return sys.maxsize
    return _SMALLEST if device.type == "cpu" else max(_SMALLEST, elements // _SHARE)


@dataclass(frozen=True)
class _Numbers:
    """The hyper-parameters of a call, which are the same for all its tensors.

    Attributes:
        lr: learning rate.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the square root of the bias-corrected second moment.
        weight_decay: coefficient of the decoupled weight decay.
        sign: -1 to ascend the gradient, else 1.
        grad_scale: the factor by which the gradients were multiplied; None for 1.
        skip: nonzero if the step must be skipped; None if it must not.
    """

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float | Tensor
    sign: float
    grad_scale: float | Tensor | None
    skip: Tensor | None

    def read(self) -> _Numbers:
        """Return the same as floats, with ``skip`` None; waits for the device of every tensor."""
        scale = None if self.grad_scale is None else float(self.grad_scale)
        lr, beta1, beta2, decay = (float(x) for x in (self.lr, self.beta1, self.beta2, self.weight_decay))
        return _Numbers(lr, beta1, beta2, self.eps, decay, self.sign, scale, None)

    @property
    def changes_gradients(self) -> bool:
        """Whether the update uses a modified copy of the gradients."""
        return self.sign < 0 or self.grad_scale is not None or self.skip is not None

    def on(self, device: torch.device) -> _Numbers:
        """Return the same with tensors 0-dim and on the device, and with ``skip`` as a boolean."""

        def moved(value: Any) -> Any:
            return value.detach().reshape(()).to(device, non_blocking=True) if isinstance(value, Tensor) else value

        lr, beta1, beta2, decay = (moved(x) for x in (self.lr, self.beta1, self.beta2, self.weight_decay))
        skip = None if self.skip is None else moved(self.skip) != 0
        return _Numbers(lr, beta1, beta2, self.eps, decay, self.sign, moved(self.grad_scale), skip)


@dataclass(frozen=True)
class _Slice:
    """The tensors of one parameter, or a slice of them that consists of whole blocks.

    Attributes:
        param: parameter.
        grad: its gradient.
        exp_avg: first moment.
        exp_avg_sq: second moment, aligned shape.
        layout: the blocks of the slice.
        size: -lr / (1 - beta1^t).
        root: sqrt(1 - beta2^t).
        copies: True if the update needs temporaries of the parameter's shape, False if only of the aligned shape.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    layout: Layout
    size: Any
    root: Any
    copies: bool

    @property
    def weight(self) -> int:
        """Number of elements of the temporaries."""
        return self.param.numel() if self.copies else self.exp_avg_sq.numel()

    def cut(self, views: Iterable[tuple[Tensor, ...]], layout: Layout) -> Iterator[_Slice]:
        """Yield a slice for each tuple of views of (param, grad, exp_avg, exp_avg_sq)."""
        for p, g, m, v in views:
            yield _Slice(p, g, m, v, layout, self.size, self.root, self.copies)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(param, grad, exp_avg, exp_avg_sq)."""
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq


def _buckets(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]
) -> dict[tuple[object, ...], list[int]]:
    """Group positions by the properties that tensors of one foreach launch must share: device, dtypes, contiguity."""
    buckets: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, tensors in enumerate(zip(params, grads, exp_avgs, strict=True)):
        contiguous = all(t.is_contiguous() for t in tensors)
        key = (tensors[0].device, *(t.dtype for t in tensors), contiguous)
        buckets[key].append(i)
    return buckets


def _corrections(
    steps: list[Tensor], numbers: _Numbers, on_device: bool
) -> tuple[Sequence[float | Tensor], Sequence[float | Tensor]]:
    """Return ``hyper.corrections`` of every tensor as (-lr / (1 - beta1^t), sqrt(1 - beta2^t))."""
    if on_device:
        sizes, roots = corrections(-numbers.lr, numbers.beta1, numbers.beta2, torch.stack(steps).to(torch.float64))
        return sizes.unbind(), roots.unbind()
    pairs = [corrections(-numbers.lr, numbers.beta1, numbers.beta2, float(step)) for step in steps]
    return [size for size, _ in pairs], [root for _, root in pairs]


def _chunks(work: Iterable[_Slice], limit: int) -> Iterator[list[_Slice]]:
    """Yield lists of slices whose temporaries have at most ``limit`` elements together; a larger slice is alone."""
    chunk: list[_Slice] = []
    weight = 0
    for part in (part for whole in work for part in _cut(whole, limit)):
        if chunk and weight + part.weight > limit:
            yield chunk
            chunk, weight = [], 0
        chunk.append(part)
        weight += part.weight
    if chunk:
        yield chunk


def _cut(whole: _Slice, limit: int) -> Iterator[_Slice]:
    """Cut along axis 0, between blocks, if the temporaries are larger than ``limit`` and the layout allows a cut.

    On a CPU only temporaries of the aligned shape count here, because ``_step`` cuts all others with fewer calls.
    """
    layout = whole.layout
    count = whole.exp_avg_sq.numel() if whole.param.device.type == "cpu" else whole.weight
    if layout.fold > 1:
        whole, layout = next(whole.cut([tuple(layout.unfold(*whole.tensors))], layout.unfolded())), layout.unfolded()
    segments = layout.runs.segments
    if count <= limit or not (layout.leading or (layout.axis == 0 and len(segments) == 1)):
        yield whole
        return
    length = 1 if layout.leading else segments[0][0]
    if layout.leading and count > limit * len(whole.param):
        inner = Layout(layout.axis - 1, layout.runs, layout.leading[1:])
        for part in whole.cut(zip(*(t.unbind() for t in whole.tensors), strict=True), inner):
            yield from _cut(part, limit)
        return
    rows = max(1, limit * len(whole.param) // (count * length)) * length
    for views in zip(*(t.split(rows) for t in whole.tensors), strict=True):
        yield from whole.cut([views], _of_rows(layout, len(views[0])))


def _of_rows(layout: Layout, rows: int) -> Layout:
    """Return the layout of a slice of axis 0 that has ``rows`` indices."""
    if layout.leading:
        return Layout(layout.axis, layout.runs, (rows, *layout.leading[1:]))
    length = layout.runs.segments[0][0]
    return Layout(0, Runs(((length, rows // length),)))


def _step(chunk: list[_Slice], numbers: _Numbers, limit: int) -> None:
    """Update the second moments of a chunk, then its first moments and parameters; a large tensor goes in slices."""
    scales = _second_moments(chunk, numbers)
    if len(chunk) > 1 or not chunk[0].copies or chunk[0].weight <= limit:
        _update([x.param for x in chunk], [x.grad for x in chunk], [x.exp_avg for x in chunk], scales, numbers)
        return
    large, scale = chunk[0], scales[0]
    dim, size = _direction(large.param, limit)
    for start in range(0, large.param.size(dim), size):
        p, g, m, s = (
            t if t.size(dim) == 1 else t.narrow(dim, start, min(size, t.size(dim) - start))
            for t in (large.param, large.grad, large.exp_avg, scale)
        )
        _update([p], [g], [m], [s], numbers)


def _direction(x: Tensor, limit: int) -> tuple[int, int]:
    """Return (axis, indices per slice) to cut a tensor into slices of at most ``limit`` elements, where possible."""
    fitting = (d for d in range(x.dim()) if x.numel() <= limit * x.size(d))
    dim = next(fitting, max(range(x.dim()), key=x.size))
    return dim, max(1, limit * x.size(dim) // x.numel())


def _second_moments(chunk: list[_Slice], numbers: _Numbers) -> list[Tensor]:
    """Update v; return the factor of each first moment in the update, aligned shape, negative to descend."""
    means = [block_mean_square(x.grad, x.layout) for x in chunk]
    seconds = [x.exp_avg_sq for x in chunk]
    if numbers.grad_scale is not None:
        torch._foreach_div_(means, numbers.grad_scale)
        torch._foreach_div_(means, numbers.grad_scale)  # divided twice, because the square of the scale may overflow
    if numbers.skip is not None:
        means = [torch.where(numbers.skip, v, mean) for v, mean in zip(seconds, means, strict=True)]
    _lerp_(seconds, means, 1 - numbers.beta2)
    del means
    scales = list(torch._foreach_sqrt(seconds))
    torch._foreach_div_(scales, [x.root for x in chunk])
    torch._foreach_add_(scales, numbers.eps)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, [x.size for x in chunk])
    if numbers.skip is not None:
        scales = [scale.masked_fill_(numbers.skip, 0.0) for scale in scales]
    return scales


def _update(
    params: list[Tensor], grads: list[Tensor], firsts: list[Tensor], scales: list[Tensor], numbers: _Numbers
) -> None:
    """Apply weight decay, update first moments and parameters of one device and dtypes; each is rounded once."""
    stored_params, stored_firsts = params, firsts
    params, firsts = _widened(params, params[0]), _widened(firsts, firsts[0])
    grads = _widened(grads, firsts[0])
    if numbers.grad_scale is not None:
        grads = list(torch._foreach_div(grads, numbers.grad_scale))
    if numbers.sign < 0:
        grads = list(torch._foreach_neg(grads))
    if numbers.skip is not None:
        grads = [torch.where(numbers.skip, m, g) for m, g in zip(firsts, grads, strict=True)]
    _lerp_(firsts, grads, 1 - numbers.beta1)
    del grads
    if isinstance(numbers.weight_decay, Tensor) or numbers.weight_decay:
        decay = numbers.lr * numbers.weight_decay
        if numbers.skip is not None:
            decay = decay * (~numbers.skip).to(torch.float64)
        torch._foreach_mul_(params, 1 - decay)
    torch._foreach_addcmul_(params, firsts, scales)
    if params is not stored_params:
        torch._foreach_copy_(stored_params, params)
    if firsts is not stored_firsts:
        torch._foreach_copy_(stored_firsts, firsts)


def _lerp_(starts: list[Tensor], ends: list[Tensor], weight: float | Tensor) -> None:
    """Add ``weight * (ends - starts)`` to ``starts`` in place; equal values stay exactly the same."""
    if isinstance(weight, Tensor):
        torch._foreach_lerp_(starts, ends, [weight.to(starts[0].dtype)] * len(starts))
    else:
        torch._foreach_lerp_(starts, ends, weight)


def _widened(tensors: list[Tensor], like: Tensor) -> list[Tensor]:
    """Return the list if its tensors have the wide dtype of ``like``, else copies in that dtype."""
    wide = _wide(like.dtype)
    return tensors if tensors[0].dtype == wide else [t.to(wide) for t in tensors]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic: the dtype itself if it is fp32 or float64, else fp32."""
    return dtype if dtype in _WIDE else torch.float32
