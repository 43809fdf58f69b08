"""The step over lists of tensors, with torch's own foreach operations.

Tensors are sorted into buckets that one foreach call can take together, and a bucket is worked through in chunks. A
chunk holds several tensors, or one slice of a large one, so that its temporaries are bounded. Everything that has a
layout's aligned shape is batched; the reductions are one call per slice, for torch has no foreach reduction over some
of the axes. On a CPU torch's foreach is a loop in C++; on CUDA its one launch for many tensors wants equal shapes, so
the update, where a scale broadcasts against the parameter, is one launch per tensor under a layout that shares.

Temporaries: two aligned shapes. Beside them, in slices, wide copies of the parameter, gradient and moment where those
are bf16 or fp16 or differ, and a copy of the gradient with ``maximize``, ``grad_scale`` or ``found_inf``.
What cannot be sliced is an aligned shape whose blocks cross axis 0 (columns) or differ in length along it.
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
_SMALLEST, _LARGEST_ON_CPU = 1 << 16, 1 << 18  # elements of a chunk; more gain nothing on a CPU
_SHARE = 64  # otherwise a chunk may be this part of all elements: at 16 bytes each, 5 % of bf16's p, g and m


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
    """One Adam-mini step of every tensor, its counter included, in place.

    Source: arXiv 2406.16793, Algorithm 1; the equations in the order of ``reference.reference_step``.

    Args:
        params: parameters, changed; any strides and floating-point dtypes, any devices.
        grads: their gradients, same shapes and devices, any strides, expanded ones too; read only.
        exp_avgs: first moments, same shapes, changed.
        exp_avg_sqs: second moments, ``layout.aligned_shape``, fp32 or float64, changed.
        steps: steps taken before this one, 0-dim fp32, changed.
        layouts: the parameters' blocks.
        lr: learning rate; a 0-dim tensor is read as a number unless ``capturable``.
        beta1: decay of the first moment; likewise.
        beta2: decay of the second moment; likewise.
        eps: added outside the root.
        weight_decay: decoupled weight decay; likewise.
        maximize: ascend instead.
        capturable: keep every number on the device; counters must be there too. Always so under ``torch.compile``.
        grad_scale: one element: what the gradients were multiplied by.
        found_inf: one element: nonzero leaves everything as it is, counters included.
        chunk: elements of temporaries at a time; None: what keeps them under 5 % of a group from 4M elements on.
            Tensors stay whole under ``torch.compile``, which needs no temporaries.
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
        here = numbers.on(device)
        counters = [steps[i] for i in members]
        # A skipped step does not count, and nobody waits for the device to say whether it was.
        torch._foreach_add_(counters, 1 if here.skip is None else torch.where(here.skip, 0.0, 1.0))
        sizes, roots = _corrections(counters, here, on_device)
        dtypes = {tensors[members[0]].dtype for tensors in (params, grads, exp_avgs)}
        copies = here.changes_gradients or len(dtypes) > 1 or not dtypes <= _WIDE
        work = [_Slice(params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], layouts[i], size, root, copies)
                for i, size, root in zip(members, sizes, roots, strict=True) if params[i].numel()]  # fmt: skip
        limit = chunk or _limit(device, elements)
        for pieces in _chunks(work, limit):
            _step(pieces, here, limit)


def _limit(device: torch.device, elements: int) -> int:
    """Elements of temporaries at a time."""
    if torch.compiler.is_compiling():
        return sys.maxsize
    share = max(_SMALLEST, elements // _SHARE)
    return min(share, _LARGEST_ON_CPU) if device.type == "cpu" else share


@dataclass(frozen=True)
class _Numbers:
    """What is the same for all tensors of a call."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float | Tensor
    sign: float
    grad_scale: float | Tensor | None
    skip: Tensor | None

    def read(self) -> _Numbers:
        """Plain numbers, waiting for a device once per tensor among them; nothing is skipped any more."""
        scale = None if self.grad_scale is None else float(self.grad_scale)
        lr, beta1, beta2, decay = (float(x) for x in (self.lr, self.beta1, self.beta2, self.weight_decay))
        return _Numbers(lr, beta1, beta2, self.eps, decay, self.sign, scale, None)

    @property
    def changes_gradients(self) -> bool:
        return self.sign < 0 or self.grad_scale is not None or self.skip is not None

    def on(self, device: torch.device) -> _Numbers:
        """Tensors among them 0-dim and on the device; ``skip`` as a truth value."""

        def there(value: Any) -> Any:
            return value.detach().reshape(()).to(device, non_blocking=True) if isinstance(value, Tensor) else value

        lr, beta1, beta2, decay = (there(x) for x in (self.lr, self.beta1, self.beta2, self.weight_decay))
        skip = None if self.skip is None else there(self.skip) != 0
        return _Numbers(lr, beta1, beta2, self.eps, decay, self.sign, there(self.grad_scale), skip)


@dataclass(frozen=True)
class _Slice:
    """A tensor, or a slice of one that holds whole blocks.

    Attributes:
        size: -lr / (1 - beta1^t).
        root: sqrt(1 - beta2^t).
        copies: whether the update needs temporaries of the parameter's shape; else only of the aligned shape.
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
        """Elements of its temporaries."""
        return self.param.numel() if self.copies else self.exp_avg_sq.numel()

    def each(self, views: Iterable[tuple[Tensor, ...]], layout: Layout) -> Iterator[_Slice]:
        """Pieces of this one."""
        for p, g, m, v in views:
            yield _Slice(p, g, m, v, layout, self.size, self.root, self.copies)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq


def _buckets(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor]
) -> dict[tuple[object, ...], list[int]]:
    """Positions by what a foreach call must have in common to be one launch: device, dtypes, dense memory."""
    buckets: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, tensors in enumerate(zip(params, grads, exp_avgs, strict=True)):
        dense = all(t.is_contiguous() for t in tensors)
        key = (tensors[0].device, *(t.dtype for t in tensors), dense)
        buckets[key].append(i)
    return buckets


def _corrections(
    steps: list[Tensor], numbers: _Numbers, on_device: bool
) -> tuple[Sequence[float | Tensor], Sequence[float | Tensor]]:
    """``hyper.corrections`` of every tensor, the step size negative."""
    if on_device:
        sizes, roots = corrections(-numbers.lr, numbers.beta1, numbers.beta2, torch.stack(steps).to(torch.float64))
        return sizes.unbind(), roots.unbind()
    counted = [corrections(-numbers.lr, numbers.beta1, numbers.beta2, float(step)) for step in steps]
    return [size for size, _ in counted], [root for _, root in counted]


def _chunks(work: Iterable[_Slice], limit: int) -> Iterator[list[_Slice]]:
    """Pieces whose temporaries together have up to ``limit`` elements; one that has more comes alone."""
    chunk: list[_Slice] = []
    weight = 0
    for piece in (part for whole in work for part in _cut(whole, limit)):
        if chunk and weight + piece.weight > limit:
            yield chunk
            chunk, weight = [], 0
        chunk.append(piece)
        weight += piece.weight
    if chunk:
        yield chunk


def _cut(whole: _Slice, limit: int) -> Iterator[_Slice]:
    """Slices of axis 0 that no block crosses, where there are such slices and the temporaries are large."""
    layout, count = whole.layout, whole.weight
    if layout.fold > 1:
        whole, layout = next(whole.each([tuple(layout.unfold(*whole.tensors))], layout.unfolded())), layout.unfolded()
    segments = layout.runs.segments
    if count <= limit or not (layout.leading or (layout.axis == 0 and len(segments) == 1)):
        yield whole
        return
    length = 1 if layout.leading else segments[0][0]
    if layout.leading and count > limit * len(whole.param):
        inner = Layout(layout.axis - 1, layout.runs, layout.leading[1:])
        for part in whole.each(zip(*(t.unbind() for t in whole.tensors), strict=True), inner):
            yield from _cut(part, limit)
        return
    rows = max(1, limit * len(whole.param) // (count * length)) * length
    for views in zip(*(t.split(rows) for t in whole.tensors), strict=True):
        yield from whole.each([views], _of_rows(layout, len(views[0])))


def _of_rows(layout: Layout, rows: int) -> Layout:
    """The layout of a slice of axis 0."""
    if layout.leading:
        return Layout(layout.axis, layout.runs, (rows, *layout.leading[1:]))
    length = layout.runs.segments[0][0]
    return Layout(0, Runs(((length, rows // length),)))


def _step(chunk: list[_Slice], numbers: _Numbers, limit: int) -> None:
    """Second moments of whole blocks, then the update, in slices where a piece is larger than the limit."""
    scales = _second_moments(chunk, numbers, limit)
    if len(chunk) > 1 or not chunk[0].copies or chunk[0].weight <= limit:
        _update([x.param for x in chunk], [x.grad for x in chunk], [x.exp_avg for x in chunk], scales, numbers)
        return
    piece, scale = chunk[0], scales[0]
    dim, size = _direction(piece.param, limit)
    for start in range(0, piece.param.size(dim), size):
        p, g, m, s = (
            t if t.size(dim) == 1 else t.narrow(dim, start, min(size, t.size(dim) - start))
            for t in (piece.param, piece.grad, piece.exp_avg, scale)
        )
        _update([p], [g], [m], [s], numbers)


def _direction(x: Tensor, limit: int) -> tuple[int, int]:
    """(axis, indices of it) to slice a tensor along so that slices have at most ``limit`` elements, where possible."""
    fitting = (d for d in range(x.dim()) if x.numel() <= limit * x.size(d))
    dim = next(fitting, max(range(x.dim()), key=x.size))
    return dim, max(1, limit * x.size(dim) // x.numel())


def _second_moments(chunk: list[_Slice], numbers: _Numbers, limit: int) -> list[Tensor]:
    """Advance v; returns what each first moment is multiplied by in the update, aligned."""
    means = [_mean_square(x.grad, x.layout, limit) for x in chunk]
    seconds = [x.exp_avg_sq for x in chunk]
    if numbers.grad_scale is not None:
        torch._foreach_div_(means, numbers.grad_scale)
        torch._foreach_div_(means, numbers.grad_scale)  # twice: a square may overflow
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


def _mean_square(grad: Tensor, layout: Layout, limit: int) -> Tensor:
    """``block_mean_square``, in slices where a CPU would make a wide copy of a large gradient first."""
    wide = _wide(grad.dtype)
    if grad.dtype == wide or grad.device.type != "cpu" or grad.numel() <= limit:
        return block_mean_square(grad, layout)
    shape = layout.aligned_shape(grad.shape)
    reduced = [d for d in range(grad.dim()) if shape[d] != grad.size(d)]
    dim, size = _direction(grad, limit)
    sums = torch.zeros(shape, dtype=wide)
    for start in range(0, grad.size(dim), size):
        part = grad.narrow(dim, start, min(size, grad.size(dim) - start))
        here = sums.narrow(dim, start, part.size(dim)) if dim not in reduced else sums
        here.add_(torch.linalg.vector_norm(part, 2, dim=reduced, keepdim=True, dtype=wide).square_())
    # The root mean square of an index stands for its elements: what is left to do is the mean over runs.
    return block_mean_square(sums.div_(layout.numel_per_index(grad.shape)).sqrt_(), layout)


def _update(
    params: list[Tensor], grads: list[Tensor], firsts: list[Tensor], scales: list[Tensor], numbers: _Numbers
) -> None:
    """Weight decay, first moment and step of tensors of one device and dtype; rounded to their dtype once."""
    own_params, own_firsts = params, firsts
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
    if params is not own_params:
        torch._foreach_copy_(own_params, params)
    if firsts is not own_firsts:
        torch._foreach_copy_(own_firsts, firsts)


def _lerp_(towards: list[Tensor], ends: list[Tensor], weight: float | Tensor) -> None:
    """``towards += weight * (ends - towards)``: exact where both are equal."""
    if isinstance(weight, Tensor):
        torch._foreach_lerp_(towards, ends, [weight.to(towards[0].dtype)] * len(towards))
    else:
        torch._foreach_lerp_(towards, ends, weight)


def _widened(tensors: list[Tensor], like: Tensor) -> list[Tensor]:
    """The same list where it has ``like``'s dtype made wide already, else wide copies."""
    wide = _wide(like.dtype)
    return tensors if tensors[0].dtype == wide else [t.to(wide) for t in tensors]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _WIDE else torch.float32
