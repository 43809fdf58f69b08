"""Second moments with one value per element, the form in which some libraries gather and scatter state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..partition.layout import Layout
from ..state.blocks import LEVEL, is_level
from .geometry import Geometry


def widen(geometry: Geometry, second: Tensor, columns: Tensor | None = None) -> Tensor:
    """Return the local second moment with one value per element of the local tensor.

    Args:
        geometry: the boxes of this rank's shard.
        second: local second moment, shape ``geometry.aligned``.
        columns: local column means, if the second moment is factored; ``second`` has the row means then. This rank
            must have all columns of its rows.

    Returns:
        A new tensor of shape ``geometry.shape`` with the dtype of ``second``. Padding becomes zero.
    """
    elements = torch.zeros(geometry.shape, dtype=second.dtype, device=second.device)
    for box in geometry.boxes:
        view = box.of(elements)
        view, aligned = box.layout.unfold(view, box.of_second(second, tuple(view.shape)))
        view.copy_(aligned.expand_as(view))
    if columns is not None and geometry.columns is not None:
        state = geometry.columns
        for matrices, mean in zip(state.matrices, state.means(state.mean(columns)), strict=True):
            shares = matrices.of(columns)
            for piece in matrices.pieces:
                box = geometry.boxes[piece.box]
                rows = piece.rows(box.layout.unfold(box.of(elements))[0])
                average = piece.columns(mean)
                rows.mul_(piece.columns(shares) / average.masked_fill(average == 0, 1))
    return elements


def is_blockwise(geometry: Geometry, elements: Tensor) -> bool:
    """Return whether values per element are equal inside every block, compared within each local box."""
    for box in geometry.boxes:
        (view,) = box.layout.unfold(box.of(elements))
        layout = box.layout.unfolded()
        assert isinstance(layout, Layout)  # a factored second moment has no blocks
        aligned = layout.aligned_shape(view.shape)
        shared = [d for d, size in enumerate(aligned) if size != view.shape[d]]
        high = view.amax(shared, keepdim=True) if shared and view.numel() else view
        low = view.amin(shared, keepdim=True) if shared and view.numel() else view
        if not torch.allclose(low, high, rtol=LEVEL, atol=0) or not is_level(high, layout, LEVEL):
            return False
    return True


def narrow(geometry: Geometry, elements: Tensor) -> Tensor:
    """Return the local second moment from one value per element. This is the inverse of ``widen``.

    A value of the second moment without any element on this rank becomes zero; no step uses it.

    Args:
        geometry: the boxes of this rank's shard.
        elements: one value per element, shape ``geometry.shape``, equal inside every block.

    Returns:
        A new tensor of shape ``geometry.aligned`` with the dtype of ``elements``.
    """
    second = torch.zeros(geometry.aligned, dtype=elements.dtype, device=elements.device)
    for box in geometry.boxes:
        view = box.of(elements)
        view, aligned = box.layout.unfold(view, box.of_second(second, tuple(view.shape)))
        shared = [d for d, size in enumerate(aligned.shape) if size != view.shape[d]]
        aligned.copy_(view.amax(shared, keepdim=True) if shared else view)
    return second


def settle(state: dict[str, Any], geometry: Geometry, steps: set[int]) -> bool:
    """Convert state that a library wrote element by element to the form that the optimizer stores.

    A factored second moment stays as it is, because its means are sums over ranks (``Shards.settle``).

    Args:
        state: state of a flat tensor, changed in place.
        geometry: the boxes and blocks of the flat tensor.
        steps: ``id`` of the step counter of every parameter converted before; this parameter's is added.

    Returns:
        Whether a library wrote the state, so that its first moment must be converted, too.
    """
    if "step" in state and (not isinstance(state["step"], Tensor) or id(state["step"]) in steps):
        # A library may store one counter for all parameters; each of their steps would then increment it again.
        state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
    steps.add(id(state.get("step")))
    second = state.get("exp_avg_sq")
    if second is None or second.shape != geometry.shape or geometry.shape == geometry.aligned:
        return False
    if geometry.columns is None:
        state["exp_avg_sq"] = narrow(geometry, second)
    return True
