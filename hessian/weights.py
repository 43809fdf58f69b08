"""What the loss of a batch is a mean over, so that batches of unequal size can be weighted by it.

A mean over rows, over predicted tokens or over the positions of a mask look alike from outside. Each is a candidate,
and the Hessian itself decides between them: the product of two batches taken together must be the weighted mean of
their own products.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from .symmetry import rounding

IGNORED = -100
"""Labels that torch's cross entropy and Hugging Face's losses leave out of the mean."""
AGREEMENT = 1e-3
"""Products, and shares of batches, that differ by less count as equal (or by the square root of a coarser epsilon)."""


@dataclass(frozen=True)
class Measure:
    """A candidate for what the loss is a mean over.

    Attributes:
        what: in words.
        path: where its tensor lies in the batch; empty for none.
        count: of that tensor.
    """

    what: str
    path: str
    count: Callable[[Tensor], int]

    def of(self, batch: Any) -> int:
        """The count of one batch."""
        return self.count(tensors_of(batch)[self.path]) if self.path else 1


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """Path -> tensor, for every tensor in nested tuples, lists and dicts; a path reads ``['labels']`` or ``[0]``."""
    leaves = tree_flatten_with_path(batch)[0]
    return {keystr(path) or "[...]": leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _fixed(batches: Sequence[Any]) -> set[str]:
    """Paths of tensors that are equal in all of several batches: masks, class weights, constants."""
    if len(batches) < 2:
        return set()
    first, *others = (tensors_of(batch) for batch in batches)
    return {path for path, tensor in first.items() if all(_same(tensor, other[path]) for other in others)}


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))


def _packed(tensors: dict[str, Tensor]) -> bool:
    """Whether a tensor holds the bounds of sequences in another (``cu_seqlens``): such batches do not concatenate."""
    for t in tensors.values():
        if t.dim() != 1 or len(t) < 2 or t.is_floating_point() or t.dtype == torch.bool:
            continue
        unlike = {size for other in tensors.values() if other.dim() and len(other) != len(t) for size in other.shape}
        if int(t[0]) == 0 and int(t[-1]) in unlike and bool((t[1:] >= t[:-1]).all()):
            return True
    return False


def _rows(batch: Any, fixed: set[str]) -> int | None:
    """The size that the leading axes share, if need be without tensors that are the same in every batch."""
    tensors = {path: t for path, t in tensors_of(batch).items() if t.dim()}
    for chosen in (tensors, {path: t for path, t in tensors.items() if path not in fixed}):
        sizes = {len(t) for t in chosen.values()}
        if len(sizes) == 1:
            return sizes.pop()
    return None


def _rebuilt(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def doubled(batch: Any, batches: Sequence[Any]) -> Any:
    """The batch with every example twice; None where what an example is cannot be told."""
    tensors = tensors_of(batch)
    rows = _rows(batch, _fixed(batches))
    if rows is None:
        sizes = Counter(len(t) for t in tensors.values() if t.dim())
        rows = sizes.most_common(1)[0][0] if sizes else None
    if rows is None or any(_packed(tensors_of(each)) for each in batches):
        return None
    return _rebuilt(batch, lambda t: torch.cat([t, t]) if t.dim() and len(t) == rows else t)


def _joined(first: Any, second: Any, fixed: set[str]) -> Any:
    """Both batches as one; None where their tensors do not concatenate."""
    rows = _rows(first, fixed), _rows(second, fixed)
    if None in rows:
        return None
    leaves, spec = tree_flatten(first)
    together = []
    for a, b in zip(leaves, tree_flatten(second)[0], strict=True):
        if isinstance(a, Tensor) and a.dim() and (len(a), len(b)) == rows and a.shape[1:] == b.shape[1:]:
            together.append(torch.cat([a, b]))
        elif _same(a, b) if isinstance(a, Tensor) else a is b or a == b:
            together.append(a)
        else:
            return None
    return tree_unflatten(together, spec)


def _halves(batch: Any, fixed: set[str]) -> tuple[Any, Any] | None:
    """A batch cut in two along its examples; None where it cannot be."""
    rows = _rows(batch, fixed)
    if rows is None or rows < 2:
        return None
    cut = rows // 2
    return (
        _rebuilt(batch, lambda t: t[:cut] if t.dim() and len(t) == rows else t),
        _rebuilt(batch, lambda t: t[cut:] if t.dim() and len(t) == rows else t),
    )


def _is_label(tensor: Tensor) -> Tensor:
    return tensor != IGNORED


def _tally(keep: Callable[[Tensor], Tensor], start: int, tensor: Tensor) -> int:
    """How many entries are kept, from position ``start`` of each row on."""
    return int(keep(tensor[..., start:] if start else tensor).sum())


def measures(batches: Sequence[Any]) -> list[Measure]:
    """Candidates for what the loss is a mean over: those under which every batch holds something."""
    fixed, named = _fixed(batches), [tensors_of(batch) for batch in batches]
    out: list[Measure] = []
    for path, tensor in named[0].items():
        if path in fixed or not tensor.dim():
            continue
        name = f"batch{path}" if path != "[...]" else "the batch"
        out += [Measure(f"rows of {name}", path, len), Measure(f"entries of {name}", path, Tensor.numel)]
        key, whole = path.lower(), not tensor.is_floating_point()
        kept: dict[str, Callable[[Tensor], Tensor]] = {}
        if whole and (any(bool((each[path] == IGNORED).any()) for each in named) or "label" in key or "target" in key):
            kept[f"labels in {name} other than {IGNORED}"] = _is_label
        if tensor.dtype == torch.bool or "mask" in key:
            kept[f"positions that {name} keeps"] = torch.Tensor.bool
        for what, keep in kept.items():
            out.append(Measure(what, path, partial(_tally, keep, 0)))
            if tensor.dim() > 1:
                out.append(Measure(f"{what}, the first of each row left out", path, partial(_tally, keep, 1)))
    found = [measure for measure in out if all(measure.of(batch) > 0 for batch in batches)]
    return found or [Measure("batches", "", len)]


def shares(counts: Sequence[float]) -> list[float]:
    """Counts over their sum."""
    return [count / sum(counts) for count in counts]


def counted(count: Callable[[Any], float], batches: Sequence[Any]) -> list[float]:
    """What ``count`` gives for each batch, as shares.

    Raises:
        TypeError: not numbers.
        ValueError: not positive and finite.
    """
    counts = [count(batch) for batch in batches]
    counts = [c.item() if isinstance(c, Tensor) and c.numel() == 1 else c for c in counts]
    for i, each in enumerate(counts):
        if not isinstance(each, numbers.Real):
            raise TypeError(f"count(batches[{i}]) gave a {type(each).__name__}; it must return a number")
        if not (math.isfinite(each) and each > 0):
            raise ValueError(
                f"count(batches[{i}]) gave {each}; every batch must hold at least one example (or token): drop it"
            )
    return shares([float(each) for each in counts])


def _convention(model: nn.Module, candidates: Sequence[Measure]) -> Measure | None:
    """What Hugging Face's own losses average over: labels other than -100, shifted where the model is causal."""
    theirs = next((m for m in model.modules() if hasattr(m, "loss_type") and hasattr(m, "config")), None)
    if theirs is None:
        return None
    causal = theirs.loss_type in (None, "ForCausalLM", "ForConditionalGeneration")
    causal = causal and not getattr(theirs.config, "is_encoder_decoder", False)
    for path, shift in (("['shift_labels']", False), ("['labels']", causal)):
        mine = [m for m in candidates if m.path == path and m.what.startswith("labels in")]
        if mine:
            return mine[-1] if shift else mine[0]
    return None


def plain(batches: Sequence[Any]) -> list[float]:
    """Shares of batches whose tensors leave no doubt about them, without a question to the loss.

    Raises:
        ValueError: candidates for what the loss is a mean over give different shares.
    """
    found = measures(batches)
    every = {tuple(shares([measure.of(batch) for batch in batches])): measure.what for measure in found}
    if len(every) > 1:
        raise ValueError(f"batches differ in what a loss may be a mean over: {list(every.values())}; give count=")
    return list(next(iter(every)))


class Weighing:
    """Shares of batches in the mean over all of them.

    Args:
        model: whose library may say what its loss averages over, asked where the Hessian cannot tell.
        batches: two or more of one structure.
        product_of: the Hessian of one batch's loss times one fixed vector, flat.
        ask: whether the loss is a mean over independent examples, so that batches may be joined and cut.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], product_of: Callable[[Any], Tensor], *, ask: bool
    ) -> None:
        self._model, self._batches, self._product_of = model, batches, product_of
        self._ask = ask and not any(_packed(tensors_of(batch)) for batch in batches)
        self._fixed = _fixed(batches)
        self._misfit = dict.fromkeys(measures(batches), 0.0)

    def shares(self, products: Iterable[Tensor]) -> list[float]:
        """The shares.

        Args:
            products: ``product_of`` each batch, in order; used once.

        Raises:
            ValueError: no candidate fits, or several that fit give different shares.
        """
        first, alone = None, []
        for i, product in enumerate(products):
            tolerance = max(AGREEMENT, math.sqrt(torch.finfo(product.dtype).eps))
            if first is None:
                first = product
            elif self._ask and not self._compare(self._batches[0], self._batches[i], first, product):
                alone.append(i)
        fitting = self._fitting(tolerance)
        if alone and self._differ(fitting, tolerance):
            for i in (0, *alone):
                halves = _halves(self._batches[i], self._fixed)
                if halves is not None:
                    self._compare(*halves, whole=self._batches[i])
            fitting = self._fitting(tolerance)
        best = min(fitting, key=lambda m: self._misfit[m])
        if self._differ(fitting, tolerance):
            usual = _convention(self._model, fitting)
            if usual is None:
                told = "; ".join(f"{m.what}: {[m.of(b) for b in self._batches[:4]]}" for m in self._unlike(fitting))
                raise ValueError(
                    f"batches differ in what the loss may be a mean over, and which it is cannot be told ({told}); say "
                    "it with count=, a function of a batch that returns how many examples or tokens its mean is over"
                )
            best = usual
        return shares([best.of(batch) for batch in self._batches])

    def _compare(
        self, a: Any, b: Any, product_a: Tensor | None = None, product_b: Tensor | None = None, whole: Any = None
    ) -> bool:
        """Hold every candidate against the product of two batches taken together; False where none is to be had."""
        try:
            whole = _joined(a, b, self._fixed) if whole is None else whole
            if whole is None:
                return False
            together = self._product_of(whole)
            product_a = self._product_of(a) if product_a is None else product_a
            product_b = self._product_of(b) if product_b is None else product_b
        except Exception:  # any complaint of the loss about a size it was not made for: it has taken the batches alone
            return False
        largest = max(float(product_a.norm()), float(product_b.norm()))
        scale = largest + rounding(together) / AGREEMENT
        if not math.isfinite(scale + float(together.norm())):  # half a batch may hold no label at all
            return False
        for measure in self._misfit:
            share = shares([measure.of(a), measure.of(b)])[0] if measure.of(a) + measure.of(b) else 0.5
            off = float((product_a * share + product_b * (1 - share) - together).norm())
            self._misfit[measure] = max(self._misfit[measure], off / scale)
        return True

    def _fitting(self, tolerance: float) -> list[Measure]:
        fitting = [measure for measure, off in self._misfit.items() if off <= tolerance]
        if not fitting:
            best = min(self._misfit, key=lambda m: self._misfit[m])
            raise ValueError(
                f"the loss of several batches together is not the mean of their losses: weighted by {best.what}, the "
                f"best of {len(self._misfit)} guesses, it is off by {self._misfit[best]:.1%}. Is it a mean over "
                "something else, as with ignore_index, class weights or a mask? Give count=, a function of a batch "
                "that returns how many examples or tokens its mean is over, or mean_check=False if the loss compares "
                "the examples of a batch with each other"
            )
        return fitting

    def _unlike(self, candidates: Sequence[Measure]) -> list[Measure]:
        """One candidate for each of the different shares."""
        seen = {tuple(shares([m.of(b) for b in self._batches])): m for m in reversed(candidates)}
        return list(seen.values())[::-1]

    def _differ(self, candidates: Sequence[Measure], tolerance: float) -> bool:
        every = torch.tensor(
            [shares([m.of(b) for b in self._batches]) for m in candidates], dtype=torch.float64
        )  # [candidates, batches]
        return bool(((every.amax(0) - every.amin(0)) > tolerance * every.amin(0)).any())
