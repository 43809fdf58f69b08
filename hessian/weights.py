"""Find what the loss of a batch is a mean over, so that batches of unequal size get the right weights.

A loss may be a mean over rows, over predicted tokens or over the positions of a mask. One batch cannot show which. Each
possibility is a candidate, and Hessian products decide between them: the product of two joined batches must be the
weighted mean of the products of the two batches.
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
"""The label that torch's cross entropy and Hugging Face's losses leave out of the mean."""
AGREEMENT = 1e-3
"""Relative difference below which products and shares count as equal; sqrt(eps) of the dtype, if that is larger."""


@dataclass(frozen=True)
class Measure:
    """A candidate for what the loss is a mean over.

    Attributes:
        what: the candidate in words.
        path: path of the tensor in the batch; empty if the candidate uses no tensor.
        count: function of that tensor that returns the count.
    """

    what: str
    path: str
    count: Callable[[Tensor], int]

    def of(self, batch: Any) -> int:
        """Return the count of one batch."""
        return self.count(tensors_of(batch)[self.path]) if self.path else 1


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """Return path -> tensor for all tensors in nested tuples, lists and dicts, with paths like ``['labels']``."""
    leaves = tree_flatten_with_path(batch)[0]
    return {keystr(path) or "[...]": leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _fixed(batches: Sequence[Any]) -> set[str]:
    """Return the paths of tensors that are equal in all batches, such as class weights; empty for a single batch."""
    if len(batches) < 2:
        return set()
    first, *others = (tensors_of(batch) for batch in batches)
    return {path for path, tensor in first.items() if all(_same(tensor, other[path]) for other in others)}


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))


def _packed(tensors: dict[str, Tensor]) -> bool:
    """Return whether one tensor lists the bounds of sequences in another (``cu_seqlens``).

    Batches of that kind cannot be joined by concatenation.
    """
    for t in tensors.values():
        if t.dim() != 1 or len(t) < 2 or t.is_floating_point() or t.dtype == torch.bool:
            continue
        other_sizes = {
            size for other in tensors.values() if other.dim() and len(other) != len(t) for size in other.shape
        }
        if int(t[0]) == 0 and int(t[-1]) in other_sizes and bool((t[1:] >= t[:-1]).all()):
            return True
    return False


def _rows(batch: Any, fixed: set[str]) -> int | None:
    """Return the number of examples: the size that all leading axes share; None if they do not share one.

    If all tensors together share no size, those in ``fixed``, which are equal in every batch, are left out.
    """
    tensors = {path: t for path, t in tensors_of(batch).items() if t.dim()}
    for candidates in (tensors, {path: t for path, t in tensors.items() if path not in fixed}):
        sizes = {len(t) for t in candidates.values()}
        if len(sizes) == 1:
            return sizes.pop()
    return None


def _rebuilt(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def doubled(batch: Any, batches: Sequence[Any]) -> Any:
    """Return the batch with every example twice, or None if the examples cannot be identified."""
    tensors = tensors_of(batch)
    rows = _rows(batch, _fixed(batches))
    if rows is None:
        sizes = Counter(len(t) for t in tensors.values() if t.dim())
        rows = sizes.most_common(1)[0][0] if sizes else None
    if rows is None or any(_packed(tensors_of(each)) for each in batches):
        return None
    return _rebuilt(batch, lambda t: torch.cat([t, t]) if t.dim() and len(t) == rows else t)


def _joined(first: Any, second: Any, fixed: set[str]) -> Any:
    """Return both batches joined into one, or None if their tensors cannot be concatenated."""
    rows = _rows(first, fixed), _rows(second, fixed)
    if None in rows:
        return None
    leaves, spec = tree_flatten(first)
    joined = []
    for a, b in zip(leaves, tree_flatten(second)[0], strict=True):
        if isinstance(a, Tensor) and a.dim() and (len(a), len(b)) == rows and a.shape[1:] == b.shape[1:]:
            joined.append(torch.cat([a, b]))
        elif _same(a, b) if isinstance(a, Tensor) else a is b or a == b:
            joined.append(a)
        else:
            return None
    return tree_unflatten(joined, spec)


def _halves(batch: Any, fixed: set[str]) -> tuple[Any, Any] | None:
    """Return a batch split in two along its examples, or None if it cannot be split."""
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
    """Return how many entries ``keep`` selects, counting from position ``start`` of each row."""
    return int(keep(tensor[..., start:] if start else tensor).sum())


def measures(batches: Sequence[Any]) -> list[Measure]:
    """Return the candidates for what the loss is a mean over; each has a positive count in every batch."""
    fixed, tensors = _fixed(batches), [tensors_of(batch) for batch in batches]
    out: list[Measure] = []
    for path, tensor in tensors[0].items():
        if path in fixed or not tensor.dim():
            continue
        name = f"batch{path}" if path != "[...]" else "the batch"
        out += [Measure(f"rows of {name}", path, len), Measure(f"entries of {name}", path, Tensor.numel)]
        key, integral = path.lower(), not tensor.is_floating_point()
        selections: dict[str, Callable[[Tensor], Tensor]] = {}
        has_ignored = integral and any(bool((by_path[path] == IGNORED).any()) for by_path in tensors)
        if integral and (has_ignored or "label" in key or "target" in key):
            selections[f"labels in {name} other than {IGNORED}"] = _is_label
        if tensor.dtype == torch.bool or "mask" in key:
            selections[f"positions that {name} keeps"] = torch.Tensor.bool
        for what, keep in selections.items():
            out.append(Measure(what, path, partial(_tally, keep, 0)))
            if tensor.dim() > 1:
                out.append(Measure(f"{what}, the first of each row left out", path, partial(_tally, keep, 1)))
    positive = [measure for measure in out if all(measure.of(batch) > 0 for batch in batches)]
    return positive or [Measure("batches", "", len)]


def shares(counts: Sequence[float]) -> list[float]:
    """Return the counts divided by their sum."""
    return [count / sum(counts) for count in counts]


def counted(count: Callable[[Any], float], batches: Sequence[Any]) -> list[float]:
    """Return the shares of the batches by a caller's function ``count``.

    Raises:
        TypeError: a count is not a number.
        ValueError: a count is not positive and finite.
    """
    counts = [count(batch) for batch in batches]
    counts = [c.item() if isinstance(c, Tensor) and c.numel() == 1 else c for c in counts]
    for i, each in enumerate(counts):
        if not isinstance(each, numbers.Real):
            raise TypeError(f"count(batches[{i}]) gave a {type(each).__name__}; it must return a number")
        if not (math.isfinite(each) and each > 0):
            raise ValueError(
                f"count(batches[{i}]) gave {each}; every batch must hold at least one example (or token): leave it out"
            )
    return shares([float(each) for each in counts])


def _convention(model: nn.Module, candidates: Sequence[Measure]) -> Measure | None:
    """Return the candidate that Hugging Face's losses average over, or None for a model of another library.

    It counts the labels other than -100; for a causal model, the first label of each row is left out.
    """
    hf_model = next((m for m in model.modules() if hasattr(m, "loss_type") and hasattr(m, "config")), None)
    if hf_model is None:
        return None
    causal = hf_model.loss_type in (None, "ForCausalLM", "ForConditionalGeneration")
    causal = causal and not getattr(hf_model.config, "is_encoder_decoder", False)
    for path, shift in (("['shift_labels']", False), ("['labels']", causal)):
        label_counts = [m for m in candidates if m.path == path and m.what.startswith("labels in")]
        if label_counts:
            return label_counts[-1] if shift else label_counts[0]
    return None


def plain(batches: Sequence[Any]) -> list[float]:
    """Return the shares of batches from their tensors alone, without evaluating the loss.

    Raises:
        ValueError: candidates for what the loss is a mean over give different shares.
    """
    by_shares = {tuple(shares([measure.of(b) for b in batches])): measure.what for measure in measures(batches)}
    if len(by_shares) > 1:
        raise ValueError(f"batches differ in what a loss may be a mean over: {list(by_shares.values())}; give count=")
    return list(next(iter(by_shares)))


class Weighing:
    """Find the share of each batch in the mean over all batches.

    Args:
        model: the model; if it is a Hugging Face model, the convention of its losses decides between candidates that
            the Hessian products cannot tell apart.
        batches: two or more batches of one structure.
        product_of: batch -> the Hessian of its loss times one fixed vector, [n].
        independent: whether the loss is a mean over independent examples, so that batches may be joined and split.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], product_of: Callable[[Any], Tensor], *, independent: bool
    ) -> None:
        self._model, self._batches, self._product_of = model, batches, product_of
        self._can_join = independent and not any(_packed(tensors_of(batch)) for batch in batches)
        self._fixed = _fixed(batches)
        self._misfit = dict.fromkeys(measures(batches), 0.0)

    def shares(self, products: Iterable[Tensor]) -> list[float]:
        """Return the share of each batch.

        Args:
            products: ``product_of`` of each batch, in order; iterated once.

        Raises:
            ValueError: no candidate fits, or several that fit give different shares.
        """
        first, not_joined = None, []
        for i, product in enumerate(products):
            tolerance = max(AGREEMENT, math.sqrt(torch.finfo(product.dtype).eps))
            if first is None:
                first = product
            elif self._can_join and not self._compare(self._batches[0], self._batches[i], first, product):
                not_joined.append(i)
        fitting = self._fitting(tolerance)
        if not_joined and self._differ(fitting, tolerance):
            for i in (0, *not_joined):
                halves = _halves(self._batches[i], self._fixed)
                if halves is not None:
                    self._compare(*halves, whole=self._batches[i])
            fitting = self._fitting(tolerance)
        best = min(fitting, key=lambda m: self._misfit[m])
        if self._differ(fitting, tolerance):
            conventional = _convention(self._model, fitting)
            if conventional is None:
                counts = "; ".join(f"{m.what}: {[m.of(b) for b in self._batches[:4]]}" for m in self._distinct(fitting))
                raise ValueError(
                    "the loss may be a mean over several quantities that weight the batches differently, and which of "
                    f"them cannot be told ({counts}); pass count=, a function of a batch that returns the number of "
                    "examples or tokens its mean is over"
                )
            best = conventional
        return shares([best.of(batch) for batch in self._batches])

    def _compare(
        self, a: Any, b: Any, product_a: Tensor | None = None, product_b: Tensor | None = None, whole: Any = None
    ) -> bool:
        """Update every candidate's misfit from the product of two joined batches.

        Args:
            a: a batch.
            b: another batch.
            product_a: the product of ``a``; computed if it is None.
            product_b: the product of ``b``; computed if it is None.
            whole: the joined batch, of which ``a`` and ``b`` are the halves; made from them if it is None.

        Returns:
            False if there is no joined batch or its product cannot be computed.
        """
        try:
            whole = _joined(a, b, self._fixed) if whole is None else whole
            if whole is None:
                return False
            product_whole = self._product_of(whole)
            product_a = self._product_of(a) if product_a is None else product_a
            product_b = self._product_of(b) if product_b is None else product_b
        except Exception:  # The loss accepted the original batches, so any error here is about the changed size.
            return False
        largest = max(float(product_a.norm()), float(product_b.norm()))
        scale = largest + rounding(product_whole.dtype, len(product_whole)) / AGREEMENT
        if not math.isfinite(scale + float(product_whole.norm())):
            return False  # Half a batch may contain no label at all; its mean is NaN.
        for measure in self._misfit:
            share = shares([measure.of(a), measure.of(b)])[0] if measure.of(a) + measure.of(b) else 0.5
            off = float((product_a * share + product_b * (1 - share) - product_whole).norm())
            self._misfit[measure] = max(self._misfit[measure], off / scale)
        return True

    def _fitting(self, tolerance: float) -> list[Measure]:
        """Return the candidates whose misfit is within the tolerance; raise ValueError if there is none."""
        fitting = [measure for measure, off in self._misfit.items() if off <= tolerance]
        if not fitting:
            best = min(self._misfit, key=lambda m: self._misfit[m])
            raise ValueError(
                f"the loss of two joined batches is not the mean of their losses: weighted by {best.what}, the "
                f"best of {len(self._misfit)} candidates, it is off by {self._misfit[best]:.1%}. It may be a mean over "
                "something else, as with ignore_index, class weights or a mask: pass count=, a function of a batch "
                "that returns how many examples or tokens its mean is over, or mean_check=False if the loss compares "
                "the examples of a batch with each other"
            )
        return fitting

    def _distinct(self, candidates: Sequence[Measure]) -> list[Measure]:
        """Return one candidate for each distinct list of shares."""
        by_shares = {tuple(shares([m.of(b) for b in self._batches])): m for m in reversed(candidates)}
        return list(by_shares.values())[::-1]

    def _differ(self, candidates: Sequence[Measure], tolerance: float) -> bool:
        """Return whether the candidates give different shares."""
        all_shares = torch.tensor(
            [shares([m.of(b) for b in self._batches]) for m in candidates], dtype=torch.float64
        )  # [candidates, batches]
        return bool(((all_shares.amax(0) - all_shares.amin(0)) > tolerance * all_shares.amin(0)).any())
