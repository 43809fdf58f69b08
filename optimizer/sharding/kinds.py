"""DTensors told apart without importing what makes them: that import takes longer than all of torch's others."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_dtensor(value: Any) -> bool:
    """Whether this is a DTensor; where nobody has imported them there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """This rank's box of a DTensor; any other tensor as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
