"""Second moments with one value per element: the form in which some libraries gather and deal out state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..state.blocks import LEVEL, is_level
from .geometry import Geometry


def widen(geometry: Geometry, second: Tensor) -> Tensor:
    """The local second moment with one value per element: the form in which FSDP1 gathers and deals out state."""
    out = torch.zeros(geometry.shape, dtype=second.dtype, device=second.device)
    for part in geometry.boxes:
        box = part.of(out)
        box, own = part.layout.unfold(box, part.of_second(second, tuple(box.shape)))
        box.copy_(own.expand_as(box))
    return out


def is_blockwise(geometry: Geometry, elements: Tensor) -> bool:
    """Whether values per element are equal inside every block, as far as the block lies here."""
    for part in geometry.boxes:
        (box,) = part.layout.unfold(part.of(elements))
        layout = part.layout.unfolded()
        kept = layout.aligned_shape(box.shape)
        shared = [d for d, size in enumerate(kept) if size != box.shape[d]]
        high = box.amax(shared, keepdim=True) if shared and box.numel() else box
        low = box.amin(shared, keepdim=True) if shared and box.numel() else box
        if not torch.allclose(low, high, rtol=LEVEL, atol=0) or not is_level(high, layout, LEVEL):
            return False
    return True


def narrow(geometry: Geometry, elements: Tensor) -> Tensor:
    """The inverse of ``widen``; values whose elements are all elsewhere become zero, and are not used."""
    second = torch.zeros(geometry.aligned, dtype=elements.dtype, device=elements.device)
    for part in geometry.boxes:
        box = part.of(elements)
        box, own = part.layout.unfold(box, part.of_second(second, tuple(box.shape)))
        shared = [d for d, size in enumerate(own.shape) if size != box.shape[d]]
        own.copy_(box.amax(shared, keepdim=True) if shared else box)
    return second


def settle(state: dict[str, Any], geometry: Geometry, dtype: torch.dtype, steps: set[int]) -> None:
    """Bring state that a universal checkpoint wrote element by element into its own form.

    Args:
        state: of a flat tensor; changed.
        geometry: what the tensor holds.
        dtype: of the first moment.
        steps: identities of the counters of other parameters; added to.
    """
    if "step" in state and (not isinstance(state["step"], Tensor) or id(state["step"]) in steps):
        # ZeRO-3 gives one counter to all: a step of theirs would count several times.
        state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
    steps.add(id(state.get("step")))
    second = state.get("exp_avg_sq")
    if second is not None and second.shape == geometry.shape != geometry.aligned:
        state["exp_avg_sq"] = narrow(geometry, second)
        state["exp_avg"] = state["exp_avg"].to(dtype)
